//! Where the pictures come from, and how they become batches.

use std::path::{Path, PathBuf};
#[cfg(feature = "download")]
use std::time::Duration;

use anyhow::{bail, Context, Result};
use candle_core::{Device, Tensor};
use rand::seq::SliceRandom;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::{digits, idx};

/// Pictures are 28×28.
pub const SIDE: usize = 28;
pub const PIXELS: usize = SIDE * SIDE;

/// Mean and standard deviation of MNIST's pixels, from 0 to 1.
const MEAN: f32 = 0.1307;
const STD: f32 = 0.3081;

/// How many digits are drawn where there is no MNIST.
const DRAWN_TRAIN: usize = 10_000;
const DRAWN_TEST: usize = 2_000;

/// Pictures of `PIXELS` bytes each, and their labels.
pub struct Split {
    pub images: Vec<u8>,
    pub labels: Vec<u8>,
}

impl Split {
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    fn truncate(&mut self, len: usize) {
        self.images.truncate(len * PIXELS);
        self.labels.truncate(len);
    }

    /// The pictures of `indices` as `[n, c, h, w]` in `shape`, normalised, and their labels `[n]`.
    ///
    /// A network that takes larger pictures gets a margin around them, and one that takes several
    /// channels the same picture in each.
    pub fn batch(
        &self,
        indices: &[usize],
        shape: [usize; 3],
        device: &Device,
    ) -> Result<(Tensor, Tensor)> {
        let [channels, height, width] = shape;
        let (top, left) = ((height - SIDE) / 2, (width - SIDE) / 2);
        let scale: Vec<f32> = (0..=255u8)
            .map(|v| (f32::from(v) / 255.0 - MEAN) / STD)
            .collect();
        let mut x = vec![scale[0]; indices.len() * channels * height * width];
        for (i, picture) in x.chunks_exact_mut(height * width).enumerate() {
            let start = indices[i / channels] * PIXELS;
            let rows = self.images[start..start + PIXELS].chunks_exact(SIDE);
            for (row, to) in rows.zip(picture.chunks_exact_mut(width).skip(top)) {
                for (pixel, to) in row.iter().zip(&mut to[left..]) {
                    *to = scale[usize::from(*pixel)];
                }
            }
        }
        let labels: Vec<u32> = indices.iter().map(|&i| self.labels[i].into()).collect();
        let x = Tensor::from_vec(x, (indices.len(), channels, height, width), device)?;
        Ok((x, Tensor::from_vec(labels, indices.len(), device)?))
    }
}

pub struct Dataset {
    pub train: Split,
    pub test: Split,
    /// What it is, for people.
    pub source: String,
    /// Where it was found, if it was.
    folder: Option<PathBuf>,
    /// Whether these are the example's own digits.
    pub drawn: bool,
}

impl Dataset {
    pub fn describe(&self) -> String {
        let folder = self.folder.as_ref();
        format!(
            "{}{}: {} training and {} test images",
            self.source,
            folder.map_or(String::new(), |dir| format!(" in {}", dir.display())),
            self.train.len(),
            self.test.len()
        )
    }

    pub fn check(&self, batch_size: usize) -> Result<()> {
        if self.train.len() < batch_size {
            bail!(
                "a batch should be at most all training images, {}, is {batch_size}",
                self.train.len()
            )
        }
        if self.test.len() == 0 {
            bail!("there should be test images: {}", self.describe())
        }
        Ok(())
    }

    /// Tells data sets apart that are called the same.
    pub fn hash(&self) -> u64 {
        let splits = [&self.train, &self.test].into_iter();
        fnv1a(splits.flat_map(|split| split.images.iter().chain(&split.labels).copied()))
    }
}

/// A hash (FNV-1a) that is the same in every release and on every machine.
pub fn fnv1a(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// The order of the training images in an epoch: the same for every model and device.
pub fn shuffled(count: usize, seed: u64, epoch: usize) -> Vec<usize> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(epoch as u64 + 1);
    let mut order: Vec<usize> = (0..count).collect();
    order.shuffle(&mut rng);
    order
}

/// What is asked for on the command line.
pub struct Wanted<'a> {
    /// `--data`
    pub folder: Option<&'a Path>,
    /// For drawn digits.
    pub seed: u64,
    /// The most training images. There are then a sixth as many for the test, but at least `test`.
    pub limit: Option<usize>,
    pub test: usize,
}

/// The first source that serves: `--data`, `MNIST_DIR`, the usual folders, the download (if built
/// in), drawn digits. A folder that was named has to serve.
pub fn load(wanted: &Wanted) -> Result<Dataset> {
    let mut data = find(wanted)?;
    if let Some(limit) = wanted.limit {
        data.train.truncate(limit);
        data.test.truncate((limit / 6).max(wanted.test));
    }
    Ok(data)
}

fn find(wanted: &Wanted) -> Result<Dataset> {
    let named = match wanted.folder {
        Some(dir) if dir.as_os_str() == "drawn" => return Ok(drawn(wanted.seed)),
        Some(dir) => Some((dir.into(), "--data")),
        None => std::env::var_os("MNIST_DIR").map(|dir| (PathBuf::from(dir), "MNIST_DIR")),
    };
    if let Some((dir, by)) = named {
        return read(&dir).with_context(|| format!("{by} names a folder that does not serve"));
    }
    let usual = [cache(), Some(PathBuf::from("data/MNIST/raw"))];
    for dir in usual.into_iter().flatten() {
        if dir.is_dir() {
            match read(&dir) {
                Ok(data) => return Ok(data),
                Err(error) => println!("passed over: {error:#}"),
            }
        }
    }
    match download() {
        Ok(Some(data)) => return Ok(data),
        Ok(None) => {}
        Err(error) => println!("the download of MNIST failed: {error:#}"),
    }
    Ok(drawn(wanted.seed))
}

fn read(dir: &Path) -> Result<Dataset> {
    Ok(Dataset {
        train: idx::read_split(dir, "train")?,
        test: idx::read_split(dir, "t10k")?,
        source: "MNIST".into(),
        folder: Some(dir.into()),
        drawn: false,
    })
}

fn drawn(seed: u64) -> Dataset {
    Dataset {
        train: digits::draw(DRAWN_TRAIN, seed),
        // Other digits than those of the training, whatever the seed.
        test: digits::draw(DRAWN_TEST, !seed),
        source: "digits drawn by this example (not MNIST)".into(),
        folder: None,
        drawn: true,
    }
}

fn cache() -> Option<PathBuf> {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")))?;
    Some(base.join("candle-batch-norm/mnist"))
}

#[cfg(not(feature = "download"))]
fn download() -> Result<Option<Dataset>> {
    Ok(None)
}

/// Fetches the four files from the mirror that torchvision uses into the cache, and reads them.
#[cfg(feature = "download")]
fn download() -> Result<Option<Dataset>> {
    const MIRROR: &str = "https://ossci-datasets.s3.amazonaws.com/mnist";
    const FILES: [&str; 4] = [
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
    ];
    let Some(dir) = cache() else { return Ok(None) };
    std::fs::create_dir_all(&dir)?;
    // Read there first, and moved only if they serve.
    let unfinished = tempfile::tempdir_in(&dir)?;
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_connect(Some(Duration::from_secs(10)))
        .timeout_global(Some(Duration::from_secs(300)))
        .build()
        .into();
    for file in FILES {
        println!("downloading {file}");
        let mut response = agent.get(format!("{MIRROR}/{file}")).call()?;
        let bytes = response
            .body_mut()
            .with_config()
            .limit(64 << 20)
            .read_to_vec()?;
        std::fs::write(unfinished.path().join(file), bytes)?;
    }
    read(unfinished.path())?;
    for file in FILES {
        std::fs::rename(unfinished.path().join(file), dir.join(file))?;
    }
    read(&dir).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_has_its_order_and_all_images() {
        let (first, second) = (shuffled(1000, 42, 0), shuffled(1000, 42, 1));
        assert_eq!(first, shuffled(1000, 42, 0));
        assert_ne!(first, second);
        let mut sorted = second;
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn pictures_keep_their_place_in_larger_batches() -> Result<()> {
        let split = digits::draw(3, 1);
        let (small, labels) = split.batch(&[2, 0], [1, 28, 28], &Device::Cpu)?;
        let (large, _) = split.batch(&[2, 0], [3, 32, 32], &Device::Cpu)?;
        assert_eq!(labels.to_vec1::<u32>()?, [2, 0]);
        let pixel = f32::from(split.images[2 * PIXELS + 5 * SIDE + 9]);
        let expected = (pixel / 255.0 - 0.1307) / 0.3081;
        let at = |t: &Tensor, c, y, x| -> Result<f32> {
            Ok(t.get(0)?.get(c)?.get(y)?.get(x)?.to_scalar()?)
        };
        assert!((at(&small, 0, 5, 9)? - expected).abs() < 1e-6);
        for channel in 0..3 {
            assert!((at(&large, channel, 7, 11)? - expected).abs() < 1e-6);
        }
        assert!((at(&large, 1, 0, 0)? + 0.1307 / 0.3081).abs() < 1e-6);
        Ok(())
    }
}
