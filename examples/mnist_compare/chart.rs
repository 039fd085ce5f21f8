//! The four-panel chart: loss and accuracy, in training and test, over the epochs.

use std::ops::Range;
use std::path::Path;

use anyhow::{anyhow, Result};
use plotters::prelude::*;
use plotters::style::{register_font, FontStyle};

use crate::state::write_whole;
use crate::train::{Epoch, Run};

const SIZE: (u32, u32) = (1200, 900);

/// Orange and blue, which colour-blind people tell apart too (Okabe and Ito).
const COLOURS: [RGBColor; 2] = [RGBColor(213, 94, 0), RGBColor(0, 114, 178)];

struct Panel {
    title: &'static str,
    axis: &'static str,
    value: fn(&Epoch) -> f64,
}

const PANELS: [Panel; 4] = [
    Panel {
        title: "Training loss",
        axis: "loss",
        value: |e| e.train_loss,
    },
    Panel {
        title: "Training accuracy",
        axis: "percent",
        value: |e| e.train_accuracy * 100.0,
    },
    Panel {
        title: "Test loss",
        axis: "loss",
        value: |e| e.test_loss,
    },
    Panel {
        title: "Test accuracy",
        axis: "percent",
        value: |e| e.test_accuracy * 100.0,
    },
];

/// Writes `{path}.png` and `{path}.svg`.
pub fn draw(runs: &[Run], title: &str, path: &Path) -> Result<()> {
    let font = &epaint_default_fonts::UBUNTU_LIGHT;
    register_font("sans-serif", FontStyle::Normal, font)
        .map_err(|_| anyhow!("the chart's font does not load"))?;

    let mut svg = String::new();
    panels(
        &SVGBackend::with_string(&mut svg, SIZE).into_drawing_area(),
        runs,
        title,
    )?;
    write_whole(&path.with_extension("svg"), svg.as_bytes())?;

    // The encoder goes by the file's ending, so it gets a file of its own that is then moved.
    let dir = tempfile::tempdir_in(path.parent().unwrap_or(Path::new(".")))?;
    let png = dir.path().join("chart.png");
    panels(
        &BitMapBackend::new(&png, SIZE).into_drawing_area(),
        runs,
        title,
    )?;
    std::fs::rename(png, path.with_extension("png"))?;
    Ok(())
}

fn panels<B: DrawingBackend>(
    root: &DrawingArea<B, plotters::coord::Shift>,
    runs: &[Run],
    title: &str,
) -> Result<()>
where
    B::ErrorType: 'static,
{
    root.fill(&WHITE)?;
    let below = root.margin(14, 0, 0, 0).titled(title, ("sans-serif", 28))?;
    for (area, panel) in below.split_evenly((2, 2)).iter().zip(&PANELS) {
        draw_panel(area, runs, panel)?;
    }
    root.present()?;
    Ok(())
}

/// The corner in which the legend hides the fewest points; losses fall and accuracies rise, so that
/// most often the right-hand side is empty above or below.
fn legend_corner(runs: &[Run], panel: &Panel, range: Range<f64>) -> SeriesLabelPosition {
    use SeriesLabelPosition::{LowerLeft, LowerRight, UpperLeft, UpperRight};
    let corners = [
        (UpperRight, true, true),
        (LowerRight, true, false),
        (LowerLeft, false, false),
        (UpperLeft, false, true),
    ];
    let hidden = |right: bool, upper: bool| {
        let inside = |run: &Run, i: usize, value: f64| {
            let across = (i as f64 + 0.5) / run.history.len() as f64;
            let up = (value - range.start) / (range.end - range.start);
            let (across, up) = (
                if right { across } else { 1.0 - across },
                if upper { up } else { 1.0 - up },
            );
            across > 0.6 && up > 0.7
        };
        let count = |run: &Run| {
            let values = run.history.iter().map(panel.value).enumerate();
            values.filter(|&(i, value)| inside(run, i, value)).count()
        };
        runs.iter().map(count).sum::<usize>()
    };
    let best = corners.into_iter().min_by_key(|&(_, r, u)| hidden(r, u));
    best.map_or(UpperRight, |(corner, ..)| corner)
}

/// The label of a tick. A loss that runs away would not fit in plain digits.
fn tick(y: f64) -> String {
    match y.abs() >= 1e5 {
        true => format!("{y:.1e}"),
        // Rounding first spares the labels the noise of the last bits.
        false => ((y * 1e6).round() / 1e6).to_string(),
    }
}

fn draw_panel<B: DrawingBackend>(
    area: &DrawingArea<B, plotters::coord::Shift>,
    runs: &[Run],
    panel: &Panel,
) -> Result<()>
where
    B::ErrorType: 'static,
{
    let epochs = runs.iter().map(|run| run.history.len()).max().unwrap_or(0);
    let values = runs
        .iter()
        .flat_map(|run| run.history.iter().map(panel.value))
        .filter(|value| value.is_finite());
    let (low, high) = values.fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
    let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
    let margin = ((high - low) * 0.08).max(high.abs() * 1e-3).max(1e-6);

    let mut chart = ChartBuilder::on(area)
        .caption(panel.title, ("sans-serif", 22))
        .margin(14)
        .x_label_area_size(42)
        .y_label_area_size(70)
        .build_cartesian_2d(0.5..epochs.max(1) as f64 + 0.5, low - margin..high + margin)?;
    chart
        .configure_mesh()
        .x_desc("epoch")
        .y_desc(panel.axis)
        .x_labels(epochs.clamp(1, 10) + 1)
        .x_label_formatter(&|x| match x.fract() == 0.0 {
            true => format!("{x:.0}"),
            false => String::new(),
        })
        .label_style(("sans-serif", 16))
        .axis_desc_style(("sans-serif", 17))
        .y_label_formatter(&|y| tick(*y))
        .light_line_style(WHITE)
        .draw()?;
    for run in runs {
        let colour = COLOURS[usize::from(run.with_bn)];
        let points = run
            .history
            .iter()
            .enumerate()
            .map(|(i, e)| ((i + 1) as f64, (panel.value)(e)))
            // A loss that is not a number any more has no place in the chart.
            .filter(|(_, value)| value.is_finite());
        let points: Vec<_> = points.collect();
        let line = LineSeries::new(points.clone(), colour.stroke_width(2));
        // Squares and circles tell the models apart in black and white.
        if run.with_bn {
            chart
                .draw_series(line)?
                .label(run.title())
                .legend(move |(x, y)| Circle::new((x + 10, y), 5, colour.filled()).into_dyn());
            chart.draw_series(points.iter().map(|&p| Circle::new(p, 5, colour.filled())))?;
        } else {
            chart
                .draw_series(line)?
                .label(run.title())
                .legend(move |(x, y)| {
                    Rectangle::new([(x + 5, y - 5), (x + 15, y + 5)], colour.filled()).into_dyn()
                });
            chart.draw_series(points.iter().map(|&p| {
                EmptyElement::at(p) + Rectangle::new([(-4, -4), (5, 5)], colour.filled())
            }))?;
        }
    }
    chart
        .configure_series_labels()
        .label_font(("sans-serif", 16))
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .position(legend_corner(runs, panel, low..high))
        .draw()?;
    Ok(())
}
