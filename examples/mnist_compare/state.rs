//! Files to resume from: one for each model, with its variables, its optimiser and its history, so
//! that these cannot disagree; and the trained model by itself. All are replaced whole or not at all.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};
use candle_core::{Device, Tensor};
use safetensors::SafeTensors;
use serde_json::Value;

use crate::config::Config;
use crate::norms::Contender;
use crate::sgd::sorted;
use crate::train::{Epoch, Run};

const HISTORY: &str = "history";

/// Writes `{key}.safetensors`, for `VarMap::load`, and `{key}.resume.safetensors`.
pub fn save(run: &Run, config: &Config, dir: &Path) -> Result<()> {
    let vars = sorted(&run.vars);
    let model: Vec<_> = vars
        .iter()
        .map(|(name, var)| (name.clone(), var.as_tensor()))
        .collect();
    let model = safetensors::serialize(model, None)?;

    let mut tensors = vec![(HISTORY.to_string(), history_tensor(&run.record.history)?)];
    for (name, var) in vars {
        tensors.push((format!("model.{name}"), var.as_tensor().clone()));
    }
    for ((name, _), velocity) in run.sgd.vars.iter().zip(&run.sgd.velocities) {
        if let Some(velocity) = velocity {
            tensors.push((format!("velocity.{name}"), velocity.clone()));
        }
    }
    let metadata = HashMap::from([(
        "config".to_string(),
        serde_json::to_string(&config.of(&run.record.contender))?,
    )]);
    let tensors = tensors.iter().map(|(name, tensor)| (name, tensor));
    let resume = safetensors::serialize(tensors, Some(metadata))?;

    let key = &run.record.contender.key;
    write_whole(&resume_file(dir, key), &resume)?;
    write_whole(&dir.join(format!("{key}.safetensors")), &model)
}

/// Removes what earlier runs of these contenders left in `dir` to resume from, so that a later `--resume` of them
/// cannot meet it. The trained models stay until others replace them.
pub fn forget(contenders: &[Contender], dir: &Path) -> Result<()> {
    for contender in contenders {
        let path = resume_file(dir, &contender.key);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", path.display()))
            }
            _ => {}
        }
    }
    Ok(())
}

fn resume_file(dir: &Path, key: &str) -> PathBuf {
    dir.join(format!("{key}.resume.safetensors"))
}

/// Takes a run up where [`save`] left it, if there is something to take up.
pub fn resume(run: &mut Run, config: &Config, dir: &Path) -> Result<()> {
    let contender = &run.record.contender;
    let path = resume_file(dir, &contender.key);
    if !path.exists() {
        println!(
            "{}: nothing to resume in {}, so it starts anew",
            contender.title,
            dir.display()
        );
        return Ok(());
    }
    let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    restore(run, config, &bytes).with_context(|| format!("cannot resume from {}", path.display()))
}

fn restore(run: &mut Run, config: &Config, bytes: &[u8]) -> Result<()> {
    let (_, metadata) = SafeTensors::read_metadata(bytes)?;
    let saved = metadata
        .metadata()
        .as_ref()
        .and_then(|metadata| metadata.get("config"));
    let config = &config.of(&run.record.contender);
    check_same(saved.context("it has no configuration")?, config)?;

    let tensors = candle_core::safetensors::load_buffer(bytes, &Device::Cpu)?;
    let get = |name: String| -> Result<Tensor> {
        let tensor = tensors
            .get(&name)
            .with_context(|| format!("it has no {name}"))?;
        Ok(tensor.to_device(&run.device)?)
    };
    let history = history_of(&get(HISTORY.to_string())?)?;
    if history.len() > config.epochs {
        bail!(
            "it has {} epochs, and --epochs is {}",
            history.len(),
            config.epochs
        )
    }
    // All is read before anything is changed.
    let vars = sorted(&run.vars)
        .into_iter()
        .map(|(name, var)| {
            let value = get(format!("model.{name}"))?;
            check_shape(&name, &value, &var)?;
            Ok((var, value))
        })
        .collect::<Result<Vec<_>>>()?;
    let velocities = run
        .sgd
        .vars
        .iter()
        .map(|(name, var)| {
            let Some(velocity) = tensors.get(&format!("velocity.{name}")) else {
                return Ok(None);
            };
            check_shape(name, velocity, var)?;
            Ok(Some(velocity.to_device(&run.device)?))
        })
        .collect::<Result<_>>()?;
    for (var, value) in vars {
        var.set(&value)?;
    }
    run.sgd.velocities = velocities;
    run.record.history = history;
    Ok(())
}

fn check_shape(name: &str, value: &Tensor, var: &Tensor) -> Result<()> {
    if value.shape() != var.shape() || value.dtype() != var.dtype() {
        bail!(
            "it has {name} as {:?} {:?}, expected {:?} {:?}",
            value.dtype(),
            value.shape(),
            var.dtype(),
            var.shape()
        )
    }
    Ok(())
}

/// Names everything in which a saved run differs; it may have been meant for fewer epochs.
fn check_same(saved: &str, config: &Config) -> Result<()> {
    // Both are read from text, so that numbers are rounded alike.
    let parse = serde_json::from_str::<BTreeMap<String, Value>>;
    let (saved, now) = (parse(saved)?, parse(&serde_json::to_string(config)?)?);
    let names: BTreeSet<_> = saved.keys().chain(now.keys()).collect();
    let show = |value: Option<&Value>| value.map_or("nothing".to_string(), Value::to_string);
    let differences: Vec<_> = names
        .into_iter()
        .filter(|&name| name != "epochs" && saved.get(name) != now.get(name))
        .map(|name| {
            let (was, is) = (show(saved.get(name)), show(now.get(name)));
            format!("{name} was {was}, is {is}")
        })
        .collect();
    if !differences.is_empty() {
        bail!("it is of another run: {}", differences.join("; "))
    }
    Ok(())
}

fn history_tensor(history: &[Epoch]) -> Result<Tensor> {
    let values: Vec<f64> = history
        .iter()
        .flat_map(|e| {
            [
                e.train_loss,
                e.train_accuracy,
                e.test_loss,
                e.test_accuracy,
                e.seconds,
            ]
        })
        .collect();
    Ok(Tensor::from_vec(values, (history.len(), 5), &Device::Cpu)?)
}

fn history_of(tensor: &Tensor) -> Result<Vec<Epoch>> {
    let rows = tensor.to_device(&Device::Cpu)?.to_vec2::<f64>()?;
    rows.into_iter()
        .map(|row| match row[..] {
            [train_loss, train_accuracy, test_loss, test_accuracy, seconds] => Ok(Epoch {
                train_loss,
                train_accuracy,
                test_loss,
                test_accuracy,
                seconds,
            }),
            _ => bail!("its history has {} columns, expected 5", row.len()),
        })
        .collect()
}

/// Replaces a file by a new one in one step: a reader sees the old or the new, never half of it.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let dir = path.parent().context("a file needs a folder")?;
    let write = || -> Result<()> {
        let mut builder = tempfile::Builder::new();
        #[cfg(unix)] // as any new file: temporary ones are for their owner alone
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let mut file = builder.tempfile_in(dir)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Args;
    use crate::data;
    use crate::train::train;
    use clap::Parser;
    use std::sync::atomic::AtomicBool;

    fn losses(run: &Run) -> Vec<[f64; 4]> {
        let numbers = |e: &Epoch| [e.train_loss, e.train_accuracy, e.test_loss, e.test_accuracy];
        run.record.history.iter().map(numbers).collect()
    }

    #[test]
    fn a_resumed_run_has_the_numbers_of_a_whole_one() -> Result<()> {
        let args = |epochs| {
            let args = [
                "mnist_compare",
                "--data",
                "drawn",
                "--limit",
                "256",
                "--epochs",
                epochs,
            ];
            Args::parse_from(args)
        };
        let (never, dir) = (AtomicBool::new(false), tempfile::tempdir()?);
        let data = data::load(&args("1").wanted())?;
        let config = args("3").config(&Device::Cpu, &data);
        let start = |epochs| {
            let args = args(epochs);
            Run::new(&args, args.contenders().remove(1), &Device::Cpu)
        };
        let mut whole = start("3")?;
        train(&mut whole, &args("3"), &data, &never, |_| Ok(()))?;

        let mut first = start("1")?;
        train(&mut first, &args("1"), &data, &never, |run| {
            save(run, &config, dir.path())
        })?;
        let mut second = start("3")?;
        resume(&mut second, &config, dir.path())?;
        train(&mut second, &args("3"), &data, &never, |_| Ok(()))?;
        assert_eq!(losses(&second), losses(&whole));

        for (name, var) in sorted(&whole.vars) {
            let resumed = second.vars.data().lock().unwrap()[&name].clone();
            let (a, b) = (var.flatten_all()?, resumed.flatten_all()?);
            assert_eq!(a.to_vec1::<f32>()?, b.to_vec1::<f32>()?, "{name}");
        }

        save(&second, &config, dir.path())?;
        let error_with = |other: Config| {
            let mut run = start("3").unwrap();
            format!("{:#}", resume(&mut run, &other, dir.path()).unwrap_err())
        };
        let error = error_with(Config {
            lr: 0.5,
            seed: 7,
            ..config.clone()
        });
        assert!(
            error.ends_with("lr was 0.01, is 0.5; seed was 42, is 7"),
            "{error}"
        );
        let error = error_with(Config {
            epochs: 2,
            ..config.clone()
        });
        assert!(
            error.ends_with("it has 3 epochs, and --epochs is 2"),
            "{error}"
        );

        // The other batch norm of such a pair has the same key.
        let other = Args::parse_from(["mnist_compare", "--norm", "none,candle"]);
        let mut other = Run::new(&other, other.contenders().remove(1), &Device::Cpu)?;
        let error = resume(&mut other, &config, dir.path()).unwrap_err();
        let error = format!("{error:#}");
        assert!(
            error.ends_with(r#"norm was "batch", is "candle""#),
            "{error}"
        );

        forget(&args("3").contenders(), dir.path())?;
        let left = std::fs::read_dir(dir.path())?.map(|entry| Ok(entry?.file_name()));
        let left = left.collect::<Result<Vec<_>>>()?;
        assert_eq!(left, ["with_bn.safetensors"]);
        Ok(())
    }
}
