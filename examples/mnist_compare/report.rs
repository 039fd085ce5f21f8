//! What is left at the end: a table, metrics as CSV and JSON, and the chart.

use std::fmt::Write;
use std::path::Path;

use anyhow::Result;
use serde_json::Value;

use crate::chart;
use crate::config::Config;
use crate::panels::FourPanels;
use crate::state::write_whole;
use crate::train::{Epoch, Record};

/// The test accuracy whose first epoch the table names.
const MILESTONE: f64 = 0.97;

pub fn write_files(records: &[Record], config: &Config, title: &str, dir: &Path) -> Result<()> {
    write_whole(&dir.join("metrics.csv"), &metrics_csv(records, config)?)?;
    let json = serde_json::json!({ "config": config, "epochs": histories(records)? });
    write_json(&dir.join("metrics.json"), &json)?;
    let chart = FourPanels { records, title };
    chart::write(&chart, &dir.join("batch_normalization_comparison"))
}

pub fn write_json(path: &Path, json: &Value) -> Result<()> {
    write_whole(path, serde_json::to_string_pretty(json)?.as_bytes())
}

/// The epochs of each model, by its key.
pub fn histories(records: &[Record]) -> Result<Value> {
    let models = records.iter().map(|record| {
        let history = serde_json::to_value(&record.history)?;
        Ok((record.contender.key.clone(), history))
    });
    Ok(Value::Object(models.collect::<Result<_>>()?))
}

/// A row for each epoch of each model, with its configuration in it: rows of many files can be joined.
fn metrics_csv(records: &[Record], config: &Config) -> Result<Vec<u8>> {
    let mut csv = csv::Writer::from_writer(vec![]);
    let metrics = [
        "model",
        "epoch",
        "train_loss",
        "train_accuracy",
        "test_loss",
        "test_accuracy",
        "seconds",
    ];
    let names = settings(config)?.into_iter();
    let names = names.map(|(name, _)| format!("config.{name}"));
    csv.write_record(metrics.map(String::from).into_iter().chain(names))?;
    for record in records {
        let settings = settings(&config.of(&record.contender))?;
        for (i, epoch) in record.history.iter().enumerate() {
            let numbers = [
                epoch.train_loss,
                epoch.train_accuracy,
                epoch.test_loss,
                epoch.test_accuracy,
                epoch.seconds,
            ];
            let row = [record.contender.key.clone(), (i + 1).to_string()].into_iter();
            let settings = settings.iter().map(|(_, value)| value.clone());
            csv.write_record(row.chain(numbers.map(|n| n.to_string())).chain(settings))?;
        }
    }
    Ok(csv.into_inner()?)
}

/// The configuration by name.
fn settings(config: &Config) -> Result<Vec<(String, String)>> {
    let Value::Object(settings) = serde_json::to_value(config)? else {
        return Ok(vec![]);
    };
    let text = |value| match value {
        Value::String(text) => text,
        other => other.to_string(),
    };
    let settings = settings.into_iter();
    Ok(settings.map(|(name, value)| (name, text(value))).collect())
}

/// The models side by side, after the first epoch and the last.
pub fn table(records: &[Record]) -> String {
    let mut table = String::new();
    let titles = records.iter().map(|r| r.contender.title.chars().count());
    let width = titles.max().unwrap_or(0).max("99.99 %".len()) + 4;
    let mut line = |label: &str, cell: &dyn Fn(&Record) -> String| {
        let _ = write!(table, "{label:<34}");
        for record in records {
            let _ = write!(table, "{:>width$}", cell(record));
        }
        table.push('\n');
    };
    line("", &|record| record.contender.title.clone());
    type Pick = fn(&[Epoch]) -> Option<&Epoch>;
    let picks: [(&str, Pick); 2] = [("epoch 1", |h| h.first()), ("last epoch", |h| h.last())];
    for (when, pick) in picks {
        let number = |record: &Record, f: &dyn Fn(&Epoch) -> String| {
            pick(&record.history).map_or("–".into(), f)
        };
        line(&format!("{when}: train loss"), &|record| {
            number(record, &|e| format!("{:.4}", e.train_loss))
        });
        line(&format!("{when}: train accuracy"), &|record| {
            number(record, &|e| percent(e.train_accuracy))
        });
        line(&format!("{when}: test loss"), &|record| {
            number(record, &|e| format!("{:.4}", e.test_loss))
        });
        line(&format!("{when}: test accuracy"), &|record| {
            number(record, &|e| percent(e.test_accuracy))
        });
    }
    line("epochs", &|record| record.history.len().to_string());
    line("time per epoch", &|record| {
        let seconds = seconds_per_epoch(&record.history);
        seconds.map_or("–".into(), |seconds| format!("{seconds:.2} s"))
    });
    line("epochs to 97 % test accuracy", &|record| {
        let first = record
            .history
            .iter()
            .position(|e| e.test_accuracy >= MILESTONE);
        first.map_or("–".into(), |i| (i + 1).to_string())
    });
    table
}

/// Of training, on average.
pub fn seconds_per_epoch(history: &[Epoch]) -> Option<f64> {
    let seconds: f64 = history.iter().map(|epoch| epoch.seconds).sum();
    (!history.is_empty()).then(|| seconds / history.len() as f64)
}

pub fn percent(fraction: f64) -> String {
    format!("{:.2} %", fraction * 100.0)
}
