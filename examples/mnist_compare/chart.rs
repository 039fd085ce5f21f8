//! What charts share: their files, a line for each contender, the legend.

use std::f64::consts::TAU;
use std::ops::{Add, Range};
use std::path::Path;

use anyhow::{anyhow, Result};
use plotters::coord::types::RangedCoordf64;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::{register_font, FontStyle};

use crate::norms::{Contender, NormArg};
use crate::state::write_whole;

/// An offset in pixels.
type Pixel = (i32, i32);

/// A form around a point in the coordinates `C`.
type Marker<C, B> = <EmptyElement<C, B> as Add<Polygon<Pixel>>>::Output;

pub type Points = Vec<(f64, f64)>;
pub type Chart<'a, B> = ChartContext<'a, B, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// Something that can be drawn as PNG and as SVG alike.
pub trait Picture {
    const SIZE: (u32, u32);

    fn draw<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>) -> Result<()>
    where
        B::ErrorType: 'static;
}

/// Writes `{path}.png` and `{path}.svg`.
pub fn write<P: Picture>(picture: &P, path: &Path) -> Result<()> {
    let font = &epaint_default_fonts::UBUNTU_LIGHT;
    register_font("sans-serif", FontStyle::Normal, font)
        .map_err(|_| anyhow!("the chart's font does not load"))?;

    let mut svg = String::new();
    picture.draw(&SVGBackend::with_string(&mut svg, P::SIZE).into_drawing_area())?;
    write_whole(&path.with_extension("svg"), svg.as_bytes())?;

    // The encoder goes by the file's ending, so it gets a file of its own that is then moved.
    let dir = tempfile::tempdir_in(path.parent().unwrap_or(Path::new(".")))?;
    let png = dir.path().join("chart.png");
    picture.draw(&BitMapBackend::new(&png, P::SIZE).into_drawing_area())?;
    std::fs::rename(png, path.with_extension("png"))?;
    Ok(())
}

/// Colours that colour-blind people tell apart too (Okabe and Ito).
fn colour(norm: NormArg) -> RGBColor {
    match norm {
        NormArg::None => RGBColor(213, 94, 0),
        NormArg::Batch => RGBColor(0, 114, 178),
        NormArg::Renorm => RGBColor(86, 180, 233),
        NormArg::Group => RGBColor(0, 158, 115),
        NormArg::Layer => RGBColor(204, 121, 167),
        NormArg::Instance => RGBColor(230, 159, 0),
        NormArg::Candle => BLACK,
    }
}

/// A form for each norm tells them apart in black and white: its corners, in pixels.
fn form(norm: NormArg) -> Vec<Pixel> {
    // So many corners, the first at an angle of so many degrees from the top.
    let polygon = |corners: usize, radius: f64, degrees: f64| {
        let corner = |i| {
            let angle = degrees.to_radians() + TAU * i as f64 / corners as f64;
            let (x, y) = (radius * angle.sin(), -radius * angle.cos());
            (x.round() as i32, y.round() as i32)
        };
        (0..corners).map(corner).collect()
    };
    match norm {
        NormArg::None => polygon(4, 6.0, 45.0),
        NormArg::Batch => polygon(16, 5.0, 0.0),
        NormArg::Renorm => polygon(4, 7.0, 0.0),
        NormArg::Group => polygon(3, 7.0, 0.0),
        NormArg::Layer => polygon(3, 7.0, 180.0),
        NormArg::Instance => polygon(6, 6.0, 0.0),
        NormArg::Candle => polygon(3, 7.0, 90.0),
    }
}

fn marker<C, B: DrawingBackend>(norm: NormArg, at: C) -> Marker<C, B> {
    EmptyElement::at(at) + Polygon::new(form(norm), colour(norm))
}

/// A line through `points`, with a marker at each and a place in the legend.
pub fn line<'a, B: DrawingBackend + 'a>(
    chart: &mut Chart<'a, B>,
    contender: &Contender,
    points: &Points,
) -> Result<()>
where
    B::ErrorType: 'static,
{
    let norm = contender.norm;
    let line = LineSeries::new(points.iter().copied(), colour(norm).stroke_width(2));
    chart
        .draw_series(line)?
        .label(&contender.title)
        .legend(move |(x, y)| marker(norm, (x + 10, y)));
    chart.draw_series(points.iter().map(|&at| marker(norm, at)))?;
    Ok(())
}

/// A range that holds the values of all `lines`, and some room around them.
pub fn range(lines: &[Points]) -> Range<f64> {
    let values = lines.iter().flatten().map(|&(_, y)| y);
    let (low, high) = values.fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
    let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
    let margin = ((high - low) * 0.08).max(high.abs() * 1e-3).max(1e-6);
    low - margin..high + margin
}

/// Puts the legend where it hides least of the `lines`, which are those of `contenders`.
pub fn legend<'a, B: DrawingBackend + 'a>(
    chart: &mut Chart<'a, B>,
    contenders: &[&Contender],
    lines: &[Points],
) -> Result<()>
where
    B::ErrorType: 'static,
{
    let (width, height) = chart.plotting_area().dim_in_pixel();
    let letters = contenders.iter().map(|c| c.title.chars().count()).max();
    // What plotters makes of a font of 16 pixels, roughly.
    let size = (
        (60 + 8 * letters.unwrap_or(0)) as f64 / f64::from(width),
        (15 + 21 * contenders.len()) as f64 / f64::from(height),
    );
    let (x, y) = (chart.x_range(), chart.y_range());
    let share = |value: f64, range: &Range<f64>| (value - range.start) / (range.end - range.start);
    let in_shares = |&(a, b): &(f64, f64)| (share(a, &x), share(b, &y));
    let lines = lines
        .iter()
        .map(|line| line.iter().map(in_shares).collect());
    chart
        .configure_series_labels()
        .label_font(("sans-serif", 16))
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .position(legend_place(&lines.collect::<Vec<_>>(), size))
        .draw()?;
    Ok(())
}

/// Lines and size in shares of the chart. Losses fall and accuracies rise, so that most often the
/// right-hand side is empty above or below: these places come first.
fn legend_place(lines: &[Points], (width, height): (f64, f64)) -> SeriesLabelPosition {
    use SeriesLabelPosition::*;
    let (right, middle) = (1.0 - width, (1.0 - width) / 2.0);
    let (top, centre) = (1.0 - height, (1.0 - height) / 2.0);
    let places = [
        (UpperRight, right, top),
        (LowerRight, right, 0.0),
        (LowerLeft, 0.0, 0.0),
        (UpperLeft, 0.0, top),
        (UpperMiddle, middle, top),
        (LowerMiddle, middle, 0.0),
        (MiddleRight, right, centre),
        (MiddleLeft, 0.0, centre),
    ];
    const STEPS: i32 = 16;
    let along = |ends: &[(f64, f64)]| {
        let ((x0, y0), (x1, y1)) = (ends[0], ends[1]);
        let at = move |i: i32| f64::from(i) / f64::from(STEPS);
        (0..=STEPS).map(move |i| (x0 + at(i) * (x1 - x0), y0 + at(i) * (y1 - y0)))
    };
    let on_lines = lines
        .iter()
        .flat_map(|line| line.windows(2).flat_map(along));
    let points: Points = on_lines.chain(lines.iter().flatten().copied()).collect();
    let hidden = |left: f64, bottom: f64| {
        let inside = |&&(x, y): &&(f64, f64)| {
            (left..=left + width).contains(&x) && (bottom..=bottom + height).contains(&y)
        };
        points.iter().filter(inside).count()
    };
    let best = places
        .into_iter()
        .min_by_key(|&(_, left, bottom)| hidden(left, bottom));
    best.map_or(UpperRight, |(place, ..)| place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_legend_stands_where_no_line_is() {
        let place = |lines: &[&[(f64, f64)]]| {
            let lines: Vec<Points> = lines.iter().map(|line| line.to_vec()).collect();
            format!("{:?}", legend_place(&lines, (0.3, 0.3)))
        };
        let (falling, rising) = ([(0.1, 0.9), (0.9, 0.1)], [(0.1, 0.1), (0.9, 0.9)]);
        assert_eq!(place(&[&falling]), "UpperRight");
        assert_eq!(place(&[&rising]), "LowerRight");
        assert_eq!(place(&[&falling, &rising]), "UpperMiddle");
        // Between its points a line counts, too.
        let across = [(0.6, 0.9), (1.1, 0.9)];
        assert_eq!(place(&[&across, &[(0.9, 0.1)]]), "LowerLeft");
    }
}
