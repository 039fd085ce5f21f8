//! MNIST's IDX files, plain or gzip-compressed. Every error names the file and the byte.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use anyhow::{bail, Context, Result};

use crate::data::{Split, PIXELS, SIDE};

const IMAGES: u32 = 0x0803;
const LABELS: u32 = 0x0801;

/// Reads `{prefix}-images-idx3-ubyte` and `{prefix}-labels-idx1-ubyte` from `dir`.
pub fn read_split(dir: &Path, prefix: &str) -> Result<Split> {
    let images_path = find(dir, &format!("{prefix}-images"), "idx3-ubyte")?;
    let labels_path = find(dir, &format!("{prefix}-labels"), "idx1-ubyte")?;
    let images = read_images(&images_path)?;
    let labels = read_labels(&labels_path)?;
    let count = images.len() / PIXELS;
    if labels.len() != count {
        bail!(
            "{}: at byte 4: {} labels, expected {count}, as many as the images in {}",
            labels_path.display(),
            labels.len(),
            images_path.display()
        )
    }
    Ok(Split { images, labels })
}

/// The file of that name, in one of the spellings that are around.
fn find(dir: &Path, name: &str, kind: &str) -> Result<PathBuf> {
    for file in [format!("{name}-{kind}"), format!("{name}.{kind}")] {
        for ending in ["", ".gz"] {
            let path = dir.join(format!("{file}{ending}"));
            if path.is_file() {
                return Ok(path);
            }
        }
    }
    bail!(
        "{}: no file {name}-{kind} or {name}-{kind}.gz",
        dir.display()
    )
}

fn read_images(path: &Path) -> Result<Vec<u8>> {
    let mut reader = open(path)?;
    let [count, rows, columns] = header(&mut reader, path, IMAGES)?;
    for (byte, what, got) in [(8, "rows", rows), (12, "columns", columns)] {
        if got as usize != SIDE {
            bail!(
                "{}: at byte {byte}: images of {got} {what}, expected {SIDE}",
                path.display()
            )
        }
    }
    body(reader, path, 16, count as usize * PIXELS)
}

fn read_labels(path: &Path) -> Result<Vec<u8>> {
    let mut reader = open(path)?;
    let [count] = header(&mut reader, path, LABELS)?;
    let labels = body(reader, path, 8, count as usize)?;
    if let Some(i) = labels.iter().position(|&label| label > 9) {
        bail!(
            "{}: at byte {}: label {}, expected 0 to 9",
            path.display(),
            8 + i,
            labels[i]
        )
    }
    Ok(labels)
}

fn open(path: &Path) -> Result<Box<dyn Read>> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let reader = BufReader::new(file);
    Ok(
        match path.extension().is_some_and(|ending| ending == "gz") {
            true => Box::new(flate2::bufread::MultiGzDecoder::new(reader)),
            false => Box::new(reader),
        },
    )
}

/// Reads the magic number and `N` sizes, all big-endian `u32`.
fn header<const N: usize>(reader: &mut dyn Read, path: &Path, magic: u32) -> Result<[u32; N]> {
    let mut next = |byte: usize, what: &str| -> Result<u32> {
        let mut bytes = [0; 4];
        reader.read_exact(&mut bytes).with_context(|| {
            format!(
                "{}: at byte {byte}: expected a {what} of 4 bytes",
                path.display()
            )
        })?;
        Ok(u32::from_be_bytes(bytes))
    };
    let got = next(0, "magic number")?;
    if got != magic {
        bail!(
            "{}: at byte 0: magic number {got:#06x}, expected {magic:#06x}",
            path.display()
        )
    }
    let mut sizes = [0; N];
    for (i, size) in sizes.iter_mut().enumerate() {
        *size = next(4 + 4 * i, "size")?;
    }
    Ok(sizes)
}

/// Reads the rest, which should be `expected` bytes long. Memory grows with what is really there.
fn body(reader: Box<dyn Read>, path: &Path, start: usize, expected: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![];
    let read = reader.take(expected as u64 + 1).read_to_end(&mut bytes);
    read.with_context(|| {
        format!(
            "{}: at byte {} of {} expected",
            path.display(),
            start + bytes.len(),
            start + expected
        )
    })?;
    if bytes.len() != expected {
        let end = start + bytes.len().min(expected);
        let what = if bytes.len() < expected {
            "the file ends"
        } else {
            "the file goes on"
        };
        bail!(
            "{}: at byte {end}: {what}, expected {} bytes in all",
            path.display(),
            start + expected
        )
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// Two images and two labels, changed by `change`, as files; gives the error of reading them.
    fn error_of(change: impl Fn(&mut Vec<u8>, &mut Vec<u8>)) -> String {
        let dir = tempfile::tempdir().unwrap();
        let (mut images, mut labels) = bytes();
        change(&mut images, &mut labels);
        std::fs::write(dir.path().join("train-images-idx3-ubyte"), images).unwrap();
        std::fs::write(dir.path().join("train-labels-idx1-ubyte"), labels).unwrap();
        match read_split(dir.path(), "train") {
            Ok(_) => String::new(),
            Err(error) => format!("{error:#}"),
        }
    }

    fn bytes() -> (Vec<u8>, Vec<u8>) {
        let mut images = vec![0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 28, 0, 0, 0, 28];
        images.extend((0..2 * PIXELS).map(|i| (i % 251) as u8));
        (images, vec![0, 0, 8, 1, 0, 0, 0, 2, 7, 9])
    }

    #[test]
    fn plain_and_compressed_files_read_alike() {
        let dir = tempfile::tempdir().unwrap();
        let (images, labels) = bytes();
        let path = dir.path().join("t10k-images-idx3-ubyte.gz");
        let mut gz = flate2::write::GzEncoder::new(File::create(path).unwrap(), Default::default());
        gz.write_all(&images).unwrap();
        gz.finish().unwrap();
        std::fs::write(dir.path().join("t10k-labels.idx1-ubyte"), labels).unwrap();
        let split = read_split(dir.path(), "t10k").unwrap();
        assert_eq!(split.images, images[16..]);
        assert_eq!(split.labels, [7, 9]);
    }

    #[test]
    fn errors_name_file_and_byte() {
        type Change = dyn Fn(&mut Vec<u8>, &mut Vec<u8>);
        let cases: [(&str, &Change); 8] = [
            ("", &|_, _| ()),
            (
                "train-images-idx3-ubyte: at byte 1583: the file ends, expected 1584",
                &|i, _| {
                    i.pop();
                },
            ),
            (
                "train-images-idx3-ubyte: at byte 1584: the file goes on",
                &|i, _| i.push(0),
            ),
            (
                "train-images-idx3-ubyte: at byte 0: magic number 0x0801, expected 0x0803",
                &|i, _| i[3] = 1,
            ),
            (
                "train-images-idx3-ubyte: at byte 12: images of 27 columns, expected 28",
                &|i, _| i[15] = 27,
            ),
            (
                "train-labels-idx1-ubyte: at byte 9: label 10, expected 0 to 9",
                &|_, l| l[9] = 10,
            ),
            (
                "train-labels-idx1-ubyte: at byte 4: expected a size of 4 bytes",
                &|_, l| l.truncate(6),
            ),
            (
                "train-labels-idx1-ubyte: at byte 4: 3 labels, expected 2",
                &|_, l| {
                    l[7] = 3;
                    l.push(1);
                },
            ),
        ];
        for (expected, change) in cases {
            let error = error_of(change);
            assert_eq!(expected.is_empty(), error.is_empty(), "{error}");
            assert!(
                error.contains(expected),
                "{error:?} should contain {expected:?}"
            );
        }
    }

    #[test]
    fn a_compressed_file_that_was_cut_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let mut gz = flate2::write::GzEncoder::new(vec![], Default::default());
        gz.write_all(&bytes().0).unwrap();
        let cut = gz.finish().unwrap();
        let path = dir.path().join("train-images-idx3-ubyte.gz");
        std::fs::write(&path, &cut[..cut.len() / 2]).unwrap();
        std::fs::write(dir.path().join("train-labels-idx1-ubyte"), bytes().1).unwrap();
        let error = read_split(dir.path(), "train").map(|_| ()).unwrap_err();
        let error = format!("{error:#}");
        assert!(
            error.contains("train-images-idx3-ubyte.gz: at byte "),
            "{error}"
        );
        assert!(error.contains(" of 1584 expected"), "{error}");
    }

    /// A header that promises 4 billion images must not be believed before they are seen.
    #[test]
    fn a_huge_count_is_not_allocated() {
        let error = error_of(|images, _| images[4..8].fill(0xff));
        assert!(error.contains("at byte 1584: the file ends"), "{error}");
    }
}
