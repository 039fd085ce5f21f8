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
        NormArg::Candle => polygon(3, 7.0, 0.0),
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

/// The label of a tick. A loss that runs away would not fit in plain digits.
pub fn tick(y: f64) -> String {
    match y.abs() >= 1e5 {
        true => format!("{y:.1e}"),
        // Rounding first spares the labels the noise of the last bits.
        false => ((y * 1e6).round() / 1e6).to_string(),
    }
}

/// Puts the legend where it hides the fewest points of `lines`.
pub fn legend<'a, B: DrawingBackend + 'a>(chart: &mut Chart<'a, B>, lines: &[Points]) -> Result<()>
where
    B::ErrorType: 'static,
{
    let (x, y) = (chart.x_range(), chart.y_range());
    chart
        .configure_series_labels()
        .label_font(("sans-serif", 16))
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .position(legend_corner(lines, x, y))
        .draw()?;
    Ok(())
}

/// Losses fall and accuracies rise, so that most often the right-hand side is empty above or below.
fn legend_corner(lines: &[Points], x: Range<f64>, y: Range<f64>) -> SeriesLabelPosition {
    use SeriesLabelPosition::{LowerLeft, LowerRight, UpperLeft, UpperRight};
    let corners = [
        (UpperRight, true, true),
        (LowerRight, true, false),
        (LowerLeft, false, false),
        (UpperLeft, false, true),
    ];
    // The legend grows with the lines that it names.
    let height = 0.2 + 0.06 * lines.len() as f64;
    let share = |value: f64, range: &Range<f64>, from_end: bool| {
        let share = (value - range.start) / (range.end - range.start);
        if from_end {
            share
        } else {
            1.0 - share
        }
    };
    let hidden = |right: bool, upper: bool| {
        let points = lines.iter().flatten();
        let inside = points
            .filter(|(a, b)| share(*a, &x, right) > 0.6 && share(*b, &y, upper) > 1.0 - height);
        inside.count()
    };
    let best = corners.into_iter().min_by_key(|&(_, r, u)| hidden(r, u));
    best.map_or(UpperRight, |(corner, ..)| corner)
}
