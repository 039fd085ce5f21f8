//! Compiles `kernels/*.cu` to PTX under the feature `cuda`; without it there is nothing to do.

#[cfg(not(feature = "cuda"))]
fn main() {
    println!("cargo::rerun-if-changed=build.rs");
}

#[cfg(feature = "cuda")]
fn main() -> anyhow::Result<()> {
    use anyhow::Context;

    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=CUDA_COMPUTE_CAP");
    let out_dir = std::path::PathBuf::from(std::env::var("OUT_DIR")?);
    cudaforge::KernelBuilder::new()
        .source_glob("kernels/*.cu")
        .watch(["kernels"])
        .compute_cap(portable()?)
        .with_compute_override("cluster_*.cu", CLUSTERS)
        .arg("-std=c++17")
        .arg("-O3")
        .build_ptx()
        .context("compiling kernels/*.cu needs nvcc: set CUDA_HOME, or NVCC to its path")?
        .write(out_dir.join("ptx.rs"))?;
    for dtype in ["f32", "f64", "f16", "bf16"] {
        for name in ["cluster", "cluster_rows"] {
            let path = out_dir.join(format!("{name}_{dtype}.ptx"));
            let ptx = std::fs::read_to_string(&path)?;
            // cudaforge asks for features that only this very architecture has, which later GPUs
            // refuse. The kernels use none of them.
            std::fs::write(&path, ptx.replace(".target sm_90a", ".target sm_90"))?;
        }
    }
    Ok(())
}

/// The first architecture with clusters.
#[cfg(feature = "cuda")]
const CLUSTERS: usize = 90;

/// The architecture of all other PTX.
#[cfg(feature = "cuda")]
const PORTABLE: usize = 80;

/// The same, or `CUDA_COMPUTE_CAP` (7.5 as well as 75) if that is older.
///
/// The driver compiles PTX for any GPU of this architecture or a newer one, so that no GPU is needed
/// here.
#[cfg(feature = "cuda")]
fn portable() -> anyhow::Result<usize> {
    use anyhow::Context;

    let Ok(cap) = std::env::var("CUDA_COMPUTE_CAP") else {
        return Ok(PORTABLE);
    };
    let digits: String = cap
        .trim_start_matches("sm_")
        .chars()
        .filter(|&c| c != '.')
        .take_while(char::is_ascii_digit)
        .collect();
    let cap: usize = digits.parse().with_context(|| {
        format!("CUDA_COMPUTE_CAP should be a number like 80 or 8.6, is {cap:?}")
    })?;
    Ok(cap.min(PORTABLE))
}
