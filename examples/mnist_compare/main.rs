//! Trains the same network with and without batch norm, or with any list of norms, on MNIST and compares them.
//!
//! `cargo run --release --example mnist_compare` needs neither flags nor a network; `--help` lists
//! what can be chosen. From here the way goes down to `norms` (what is compared) and `train` (the
//! runs), which uses `data` (pictures and labels) and leaves its results to `state` (files to resume
//! from), `report` (one batch size) and `sweep` (several).

mod args;
mod chart;
mod config;
mod data;
mod digits;
mod idx;
mod initial;
mod norms;
mod panels;
mod report;
mod sgd;
mod state;
mod sums;
mod sweep;
mod train;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use anyhow::{Context, Result};
use candle_core::Device;
use clap::Parser;

use args::Args;
use data::Dataset;
use sweep::{Comparison, Sweep};
use train::Run;

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
    let data = data::load(&args.wanted())?;
    data.check(args.largest_batch())?;
    println!("device   {}", config::device_name(&device));
    println!("data     {}", data.describe());
    println!("model    {}", args.describe());
    if data.drawn {
        println!("\n*** This is not MNIST: the digits were drawn by this example.");
        println!("*** Their accuracies say nothing about MNIST. Name its folder with --data DIR.");
    }
    let stop = stop_on_ctrl_c()?;
    let comparisons = train_all(args, &data, &device, &stop)?;

    let records = || comparisons.iter().flat_map(|each| &each.records);
    if records().all(|record| record.history.is_empty()) {
        println!("stopped before the first epoch ended: nothing was written");
        return Ok(ExitCode::from(INTERRUPTED));
    }
    let out = args.out.display();
    if args.batch_sizes.is_some() {
        let sweep = Sweep {
            comparisons: &comparisons,
            contenders: &args.contenders(),
            title: args.sweep_title(&data),
        };
        sweep.write_files(&args.config(&device, &data), &args.out)?;
        print!("\n{}", sweep.tables());
        println!("\nwritten to {out}: batch_sizes.png and .svg, batch_sizes.csv and .json, and a folder for each batch size");
    } else {
        print!("\n{}", report::table(&comparisons[0].records));
        println!("\nwritten to {out}: batch_normalization_comparison.png and .svg, metrics.csv, metrics.json, and each trained model");
    }

    let finished = records().filter(|record| record.history.len() == args.epochs);
    if finished.count() < args.comparisons().len() * args.contenders().len() {
        println!("stopped: the same command with --resume goes on after the last whole epoch");
        return Ok(ExitCode::from(INTERRUPTED));
    }
    Ok(verdict(&comparisons, args))
}

/// Fails if a model ended below the target.
fn verdict(comparisons: &[Comparison], args: &Args) -> ExitCode {
    let Some(target) = args.target_acc else {
        return ExitCode::SUCCESS;
    };
    let mut code = ExitCode::SUCCESS;
    for each in comparisons {
        let at = match args.batch_sizes {
            Some(_) => format!(" with batches of {}", each.batch_size),
            None => String::new(),
        };
        for (record, last) in each.below(target) {
            let title = &record.contender.title;
            println!("{title}{at}: test accuracy {last:.2} % is below the target of {target} %");
            code = ExitCode::FAILURE;
        }
    }
    code
}

/// Trains every contender at every batch size, until `stop` is set, and writes each comparison's files.
fn train_all(
    args: &Args,
    data: &Dataset,
    device: &Device,
    stop: &AtomicBool,
) -> Result<Vec<Comparison>> {
    for args in args.comparisons() {
        std::fs::create_dir_all(&args.out)
            .with_context(|| format!("cannot make the folder {}", args.out.display()))?;
        if !args.resume {
            state::forget(&args.contenders(), &args.out)?;
        }
    }
    let mut comparisons = vec![];
    for of_size in args.comparisons() {
        if args.batch_sizes.is_some() {
            let Args { batch_size, lr, .. } = of_size;
            println!("\nbatch size {batch_size}, learning rate {lr}");
        }
        let comparison = train_at_one_size(&of_size, data, device, stop)?;
        comparisons.push(comparison);
        if stop.load(Ordering::Relaxed) {
            break;
        }
    }
    Ok(comparisons)
}

fn train_at_one_size(
    args: &Args,
    data: &Dataset,
    device: &Device,
    stop: &AtomicBool,
) -> Result<Comparison> {
    let config = args.config(device, data);
    let mut records = vec![];
    for contender in args.contenders() {
        let mut run = Run::new(args, contender, device)?;
        if args.resume {
            state::resume(&mut run, &config, &args.out)?;
        }
        println!("\n{}", run.record.contender.title);
        train::train(&mut run, args, data, stop, |run| {
            state::save(run, &config, &args.out)
        })?;
        records.push(run.record);
        if stop.load(Ordering::Relaxed) {
            break;
        }
    }
    if records.iter().any(|record| !record.history.is_empty()) {
        report::write_files(&records, &config, &args.title(data), &args.out)?;
    }
    Ok(Comparison {
        batch_size: args.batch_size,
        lr: args.lr,
        records,
    })
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
