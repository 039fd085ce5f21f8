//! What becomes of each norm as the batch shrinks: tables, files and a chart of all batch sizes.

use std::fmt::Write;
use std::path::Path;

use anyhow::Result;
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::chart::{self, legend, line, range, Picture, Points};
use crate::config::Config;
use crate::norms::Contender;
use crate::report::{histories, percent, seconds_per_epoch, write_json};
use crate::state::write_whole;
use crate::train::{Epoch, Record};

/// All contenders, trained with batches of one size.
pub struct Comparison {
    pub batch_size: usize,
    pub lr: f64,
    /// In the order of the contenders; fewer if the program was stopped.
    pub records: Vec<Record>,
}

impl Comparison {
    fn last(&self, contender: usize) -> Option<&Epoch> {
        self.records.get(contender)?.history.last()
    }

    /// The models that ended below a target in percent, with where they ended.
    pub fn below(&self, target: f64) -> Vec<(&Record, f64)> {
        let accuracy = |r: &Record| r.history.last().map_or(0.0, |e| e.test_accuracy * 100.0);
        let ends = self.records.iter().map(|record| (record, accuracy(record)));
        ends.filter(|&(_, accuracy)| accuracy < target).collect()
    }
}

/// All batch sizes, and who was trained at each of them.
pub struct Sweep<'a> {
    pub comparisons: &'a [Comparison],
    pub contenders: &'a [Contender],
    pub title: String,
}

impl Sweep<'_> {
    /// A row for each batch size and a column for each contender: accuracies first, then times.
    pub fn tables(&self) -> String {
        let accuracy = self.table("test accuracy after the last epoch", |record| {
            let last = record.history.last();
            last.map(|epoch| percent(epoch.test_accuracy))
        });
        let seconds = self.table("seconds of training per epoch", |record| {
            seconds_per_epoch(&record.history).map(|seconds| format!("{seconds:.2}"))
        });
        format!("{accuracy}\n{seconds}")
    }

    fn table(&self, caption: &str, cell: impl Fn(&Record) -> Option<String>) -> String {
        let titles = self.contenders.iter().map(|c| c.title.as_str());
        let width = titles.clone().map(|title| title.chars().count());
        let width = width.max().unwrap_or(0).max("99.99 %".len()) + 4;
        let mut table = format!("{caption}\n{:>10}{:>15}", "batch size", "learning rate");
        titles.for_each(|title| _ = write!(table, "{title:>width$}"));
        for Comparison {
            batch_size,
            lr,
            records,
        } in self.comparisons
        {
            _ = write!(table, "\n{batch_size:>10}{lr:>15}");
            for i in 0..self.contenders.len() {
                let cell = records.get(i).and_then(&cell);
                _ = write!(table, "{:>width$}", cell.unwrap_or("–".into()));
            }
        }
        table.push('\n');
        table
    }

    /// Writes `batch_sizes` as .csv (the tables), .json (every epoch), .png and .svg.
    pub fn write_files(&self, config: &Config, dir: &Path) -> Result<()> {
        write_whole(&dir.join("batch_sizes.csv"), &self.csv()?)?;
        let sizes = self.comparisons.iter().map(|comparison| {
            Ok(serde_json::json!({
                "batch_size": comparison.batch_size,
                "lr": comparison.lr,
                "epochs": histories(&comparison.records)?,
            }))
        });
        let sizes = sizes.collect::<Result<Vec<_>>>()?;
        let json = serde_json::json!({ "config": config, "batch_sizes": sizes });
        write_json(&dir.join("batch_sizes.json"), &json)?;
        chart::write(self, &dir.join("batch_sizes"))
    }

    fn csv(&self) -> Result<Vec<u8>> {
        let mut csv = csv::Writer::from_writer(vec![]);
        let mut names = vec!["batch_size".to_string(), "lr".into()];
        for Contender { key, .. } in self.contenders {
            names.extend([format!("{key}.test_accuracy"), format!("{key}.seconds")]);
        }
        csv.write_record(names)?;
        for comparison in self.comparisons {
            let mut row = vec![comparison.batch_size.to_string(), comparison.lr.to_string()];
            for i in 0..self.contenders.len() {
                let accuracy = comparison.last(i).map(|epoch| epoch.test_accuracy);
                let record = comparison.records.get(i);
                let seconds = record.and_then(|record| seconds_per_epoch(&record.history));
                let cell = |value: Option<f64>| value.map_or(String::new(), |v| v.to_string());
                row.extend([cell(accuracy), cell(seconds)]);
            }
            csv.write_record(row)?;
        }
        Ok(csv.into_inner()?)
    }
}

/// Shown for an error of 0, which a logarithmic axis has no place for. In percent, one of MNIST's 10000.
const LEAST_ERROR: f64 = 0.01;

fn two_digits(value: f64) -> String {
    let digits = 1 - value.log10().floor() as i32;
    format!("{value:.*}", digits.clamp(0, 3) as usize)
}

impl Picture for Sweep<'_> {
    const SIZE: (u32, u32) = (900, 600);

    fn draw<B: DrawingBackend>(&self, root: &DrawingArea<B, Shift>) -> Result<()>
    where
        B::ErrorType: 'static,
    {
        let points = |contender| {
            let points = self.comparisons.iter().filter_map(|comparison| {
                let error = 100.0 - 100.0 * comparison.last(contender)?.test_accuracy;
                let error = error.max(LEAST_ERROR);
                Some(((comparison.batch_size as f64).log2(), error.log2()))
            });
            let mut points: Points = points.collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            points
        };
        let lines: Vec<Points> = (0..self.contenders.len()).map(points).collect();
        let sizes = self
            .comparisons
            .iter()
            .map(|c| (c.batch_size as f64).log2());
        let (low, high) = sizes.fold((f64::MAX, f64::MIN), |(l, h), x| (l.min(x), h.max(x)));

        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(root)
            .caption(&self.title, ("sans-serif", 24))
            .margin(14)
            .x_label_area_size(46)
            .y_label_area_size(70)
            .build_cartesian_2d(low - 0.3..high + 0.3, range(&lines))?;
        chart
            .configure_mesh()
            .x_desc("batch size")
            .y_desc("test error, percent")
            .x_labels((high - low) as usize + 2)
            .x_label_formatter(&|x| match x.fract() == 0.0 {
                true => x.exp2().to_string(),
                false => String::new(),
            })
            .label_style(("sans-serif", 16))
            .axis_desc_style(("sans-serif", 17))
            .y_label_formatter(&|y| two_digits(y.exp2()))
            .light_line_style(WHITE)
            .draw()?;
        for (contender, points) in self.contenders.iter().zip(&lines) {
            line(&mut chart, contender, points)?;
        }
        legend(
            &mut chart,
            &self.contenders.iter().collect::<Vec<_>>(),
            &lines,
        )?;
        root.present()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::norms::NormArg;

    fn record(contender: &Contender, last_accuracy: f64) -> Record {
        let epoch = |test_accuracy, seconds| Epoch {
            train_loss: 0.5,
            train_accuracy: 0.8,
            test_loss: 0.4,
            test_accuracy,
            seconds,
        };
        Record {
            contender: contender.clone(),
            history: vec![epoch(0.0, 2.0), epoch(last_accuracy, 4.0)],
        }
    }

    /// Two batch sizes; the program was stopped before the last contender of the second.
    fn with_sweep(check: impl FnOnce(&Sweep)) {
        let contenders = Contender::list(&[NormArg::None, NormArg::Batch, NormArg::Renorm]);
        let [none, batch, renorm] = &contenders[..] else {
            panic!("three contenders")
        };
        let comparisons = [
            Comparison {
                batch_size: 2,
                lr: 0.0003125,
                records: vec![
                    record(none, 0.5),
                    record(batch, 0.75),
                    record(renorm, 0.875),
                ],
            },
            Comparison {
                batch_size: 64,
                lr: 0.01,
                records: vec![record(none, 0.25), record(batch, 1.0)],
            },
        ];
        check(&Sweep {
            comparisons: &comparisons,
            contenders: &contenders,
            title: "drawn".into(),
        });
    }

    #[test]
    fn a_row_for_each_batch_size_and_a_column_for_each_norm() {
        with_sweep(|sweep| {
            let expected = "\
test accuracy after the last epoch
batch size  learning rate       none      batch     renorm
         2      0.0003125    50.00 %    75.00 %    87.50 %
        64           0.01    25.00 %   100.00 %          –

seconds of training per epoch
batch size  learning rate       none      batch     renorm
         2      0.0003125       3.00       3.00       3.00
        64           0.01       3.00       3.00          –
";
            assert_eq!(sweep.tables(), expected);
            let csv = String::from_utf8(sweep.csv().unwrap()).unwrap();
            let expected = "\
batch_size,lr,none.test_accuracy,none.seconds,batch.test_accuracy,batch.seconds,renorm.test_accuracy,renorm.seconds
2,0.0003125,0.5,3,0.75,3,0.875,3
64,0.01,0.25,3,1,3,,
";
            assert_eq!(csv, expected);
        });
    }

    #[test]
    fn labels_have_two_digits() {
        let labels = [0.05, 0.5, 2.0, 2.8284, 22.6, 100.0].map(two_digits);
        assert_eq!(labels, ["0.050", "0.50", "2.0", "2.8", "23", "100"]);
    }

    /// A marker of the chart's is a polygon; a legend has one for each line, too.
    #[test]
    fn the_chart_has_a_marker_for_each_training() {
        with_sweep(|sweep| {
            let dir = tempfile::tempdir().unwrap();
            chart::write(sweep, &dir.path().join("chart")).unwrap();
            let svg = std::fs::read_to_string(dir.path().join("chart.svg")).unwrap();
            let png = std::fs::read(dir.path().join("chart.png")).unwrap();
            assert!(png.starts_with(b"\x89PNG"));
            assert_eq!(svg.matches("<polygon").count(), 5 + 3);
            for label in ["none", "batch", "renorm", ">\n2\n<", ">\n64\n<", ">\n8\n<"] {
                assert!(svg.contains(label), "{label}: {svg}");
            }
            assert!(!svg.contains(">\n128\n<"));
        });
    }
}
