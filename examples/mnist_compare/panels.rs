//! The four-panel chart: loss and accuracy, in training and test, over the epochs.

use anyhow::Result;
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::chart::{legend, line, range, Picture, Points};
use crate::train::{Epoch, Record};

pub struct FourPanels<'a> {
    pub records: &'a [Record],
    pub title: &'a str,
}

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

impl Picture for FourPanels<'_> {
    const SIZE: (u32, u32) = (1200, 900);

    fn draw<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>) -> Result<()>
    where
        B::ErrorType: 'static,
    {
        root.fill(&WHITE)?;
        let below = root
            .margin(14, 0, 0, 0)
            .titled(self.title, ("sans-serif", 28))?;
        for (area, panel) in below.split_evenly((2, 2)).iter().zip(&PANELS) {
            draw_panel(area, self.records, panel)?;
        }
        root.present()?;
        Ok(())
    }
}

fn draw_panel<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    records: &[Record],
    panel: &Panel,
) -> Result<()>
where
    B::ErrorType: 'static,
{
    let lengths = records.iter().map(|record| record.history.len());
    let epochs = lengths.max().unwrap_or(0);
    let points = |record: &Record| {
        let values = record.history.iter().map(panel.value).enumerate();
        values
            .map(|(i, value)| ((i + 1) as f64, value))
            // A loss that is not a number any more has no place in the chart.
            .filter(|(_, value)| value.is_finite())
            .collect()
    };
    let lines: Vec<Points> = records.iter().map(points).collect();

    let mut chart = ChartBuilder::on(area)
        .caption(panel.title, ("sans-serif", 22))
        .margin(14)
        .x_label_area_size(42)
        .y_label_area_size(70)
        .build_cartesian_2d(0.5..epochs.max(1) as f64 + 0.5, range(&lines))?;
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
    for (record, points) in records.iter().zip(&lines) {
        line(&mut chart, &record.contender, points)?;
    }
    let contenders: Vec<_> = records.iter().map(|r| &r.contender).collect();
    legend(&mut chart, &contenders, &lines)
}

/// The label of a tick. A loss that runs away would not fit in plain digits.
fn tick(y: f64) -> String {
    match y.abs() >= 1e5 {
        true => format!("{y:.1e}"),
        // Rounding first spares the labels the noise of the last bits.
        false => ((y * 1e6).round() / 1e6).to_string(),
    }
}
