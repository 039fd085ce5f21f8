//! Compiles the kernels and the runtime that executes them with a host compiler.
//!
//! `KERNEL_SANITIZER` set to `address`, `undefined` or `thread` builds the kernels with that
//! sanitizer of gcc.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo::rerun-if-env-changed=KERNEL_SANITIZER");
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    for watched in ["build.rs", "shim", "runtime", "tests/kernels", "../kernels"] {
        println!("cargo::rerun-if-changed={watched}");
    }
    let sanitizer = env::var("KERNEL_SANITIZER").unwrap_or_default();
    println!("cargo::rustc-env=KERNEL_SANITIZER={sanitizer}");
    let library = match sanitizer.as_str() {
        "" => None,
        "address" => Some("asan"),
        "undefined" => Some("ubsan"),
        "thread" => Some("tsan"),
        other => panic!("KERNEL_SANITIZER is address, undefined or thread, not {other:?}"),
    };
    let cuda_include = cuda_include();

    let common = || {
        let mut build = cc::Build::new();
        // Enough debug information for a sanitizer to name a line, at a speed that allows for
        // many schedules; both whatever the profile.
        build.cpp(true).opt_level(2).debug(true).warnings(true);
        build.flag("-isystem").flag(&cuda_include);
        build.cpp_link_stdlib(None); // below, behind the sanitizer
        match sanitizer.as_str() {
            "address" => {
                build.define("EMULATOR_ASAN", None);
            }
            "thread" => {
                build.define("EMULATOR_TSAN", None);
            }
            _ => {}
        }
        build
    };

    let mut kernels = common();
    kernels
        .std("c++17")
        .include("shim")
        .include("../kernels")
        .flag("-include")
        .flag("cuda_emulator.h")
        .flag("-xc++")
        // nvcc's own contractions differ; here every operation is rounded.
        .flag("-ffp-contract=off")
        .flag("-fno-strict-aliasing")
        .flag("-Wno-unknown-pragmas")
        .flag("-Wno-sign-compare")
        // Values of half precision are copied as bits.
        .flag("-Wno-class-memaccess")
        .files(sources("../kernels", "cu"))
        .files(sources("tests/kernels", "cu"))
        // Or the linker would drop the objects, to which nothing refers by name.
        .link_lib_modifier("+whole-archive");
    if library.is_some() {
        kernels.flag(format!("-fsanitize={sanitizer}"));
        kernels.flag("-fno-omit-frame-pointer");
    }
    if sanitizer == "thread" {
        // gcc does not report the accesses to structs that it has put together as vectors.
        kernels.opt_level(1).flag("-fno-tree-vectorize");
    }
    if sanitizer == "undefined" {
        kernels.flag("-fno-sanitize-recover=undefined");
    }
    kernels.compile("emulated_kernels");

    // Not sanitised: it moves between stacks behind the sanitizers' backs.
    common()
        .std("c++17")
        .files(sources("runtime", "cpp"))
        .compile("emulator_runtime");

    // The first of the dynamic libraries, or the address sanitizer refuses to start.
    if let Some(library) = library {
        println!("cargo::rustc-link-lib=dylib={library}");
    }
    println!("cargo::rustc-link-lib=dylib=stdc++");
}

/// NVIDIA's headers, of which the types and conversions of half precision are used.
fn cuda_include() -> PathBuf {
    let Ok(home) = env::var("CUDA_HOME") else {
        panic!(
            "CUDA_HOME is not set: the emulator needs the headers of a CUDA toolkit. Run cargo as \
             `scripts/cuda-toolkit.sh cargo ...`, which also downloads them where there are none."
        );
    };
    let include = Path::new(&home).join("include");
    assert!(
        include.join("cuda_fp16.h").exists(),
        "{} has no cuda_fp16.h: CUDA_HOME should be a CUDA toolkit, see scripts/cuda-toolkit.sh",
        include.display()
    );
    include
}

fn sources(folder: &str, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|error| panic!("{folder}: {error}"));
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.extension().is_some_and(|found| found == extension))
        .collect();
    paths.sort();
    paths
}
