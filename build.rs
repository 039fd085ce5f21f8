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
        .compute_cap(compute_cap()?)
        .arg("-std=c++17")
        .arg("-O3")
        .build_ptx()
        .context("compiling kernels/*.cu needs nvcc: set CUDA_HOME, or NVCC to its path")?
        .write(out_dir.join("ptx.rs"))?;
    Ok(())
}

/// The architecture that the PTX is made for: 80, or `CUDA_COMPUTE_CAP` (8.6 as well as 86).
///
/// The driver compiles PTX for any GPU of this architecture or a newer one, so that no GPU is needed
/// here. From 90 on cudaforge would ask for features that only this very architecture has (90a),
/// which later GPUs refuse. The kernels use none of them, so 89 serves those GPUs as well.
#[cfg(feature = "cuda")]
fn compute_cap() -> anyhow::Result<usize> {
    use anyhow::Context;

    let Ok(cap) = std::env::var("CUDA_COMPUTE_CAP") else {
        return Ok(80);
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
    Ok(cap.min(89))
}
