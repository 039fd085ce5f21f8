//! Trains the same network with and without batch norm on MNIST and compares them.
//!
//! `cargo run --release --example mnist_compare` needs neither flags nor a network; `--help` lists
//! what can be chosen. From here the way goes down to `norms` (what is compared) and `train` (the
//! runs), which uses `data` (pictures and labels) and leaves its results to `state` (files to resume
//! from) and `report`.

mod args;
mod chart;
mod config;
mod data;
mod digits;
mod idx;
mod norms;
mod panels;
mod report;
mod sgd;
mod state;
mod train;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::Device;
use clap::Parser;

use args::Args;
use config::Config;
use data::Dataset;
use train::{Record, Run};

/// The system's allocator gives large blocks back at once, and the next tensor is paged in afresh.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// What a shell reports for a program that Ctrl-C ended.
const INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    match compare(&Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn compare(args: &Args) -> Result<ExitCode> {
    args.check()?;
    let device = args.open_device()?;
    let data = data::load(args)?;
    data.check(args.batch_size)?;
    println!("device   {}", config::device_name(&device));
    println!("data     {}", data.describe());
    println!("model    {}", args.describe());
    if data.drawn {
        println!("\n*** This is not MNIST: the digits were drawn by this example.");
        println!("*** Their accuracies say nothing about MNIST. Name its folder with --data DIR.");
    }
    std::fs::create_dir_all(&args.out)
        .with_context(|| format!("cannot make the folder {}", args.out.display()))?;

    let stop = stop_on_ctrl_c()?;
    let config = args.config(&device, &data);
    let records = train_all(args, &config, &data, &device, &stop)?;
    if records.iter().all(|record| record.history.is_empty()) {
        println!("stopped before the first epoch ended: nothing was written");
        return Ok(ExitCode::from(INTERRUPTED));
    }
    report::write_files(&records, &config, &args.title(&data), &args.out)?;
    print!("\n{}", report::table(&records));
    println!("\nwritten to {}: batch_normalization_comparison.png and .svg, metrics.csv, metrics.json, and each trained model",
        args.out.display());
    let whole = |record: &Record| record.history.len() == args.epochs;
    if records.len() < args.contenders().len() || !records.iter().all(whole) {
        println!("stopped: the same command with --resume goes on after the last whole epoch");
        return Ok(ExitCode::from(INTERRUPTED));
    }
    Ok(report::verdict(&records, args.target_acc))
}

/// Trains one contender after the other, until all are trained or `stop` is set.
fn train_all(
    args: &Args,
    config: &Config,
    data: &Dataset,
    device: &Device,
    stop: &AtomicBool,
) -> Result<Vec<Record>> {
    let contenders = args.contenders();
    if !args.resume {
        state::forget(&contenders, &args.out)?;
    }
    let mut records = vec![];
    for contender in contenders {
        let mut run = Run::new(args, contender, device)?;
        if args.resume {
            state::resume(&mut run, config, &args.out)?;
        }
        println!("\n{}", run.record.contender.title);
        train::train(&mut run, args, data, stop, |run| {
            state::save(run, config, &args.out)
        })?;
        records.push(run.record);
        if stop.load(Ordering::Relaxed) {
            break;
        }
    }
    Ok(records)
}

/// A flag that Ctrl-C sets. A second Ctrl-C ends the program at once; files are whole all the same.
fn stop_on_ctrl_c() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    ctrlc::set_handler(move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(INTERRUPTED.into());
        }
    })
    .context("cannot listen for Ctrl-C")?;
    Ok(stop)
}
