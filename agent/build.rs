//! Compiles the protocol definitions, and finds the BPF object that the agent embeds.

use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

fn main() {
    let files = ["proto/admin.proto", "proto/citadel.proto"];
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(files, ["proto"]).expect("proto files compile");
    tonic_prost_build::configure().compile_fds(descriptors).expect("proto code is generated");

    find_bpf_object();
}

/// The BPF object needs another compiler target and linker, so this script does not build it; it refuses to embed one
/// that is missing or older than its sources.
fn find_bpf_object() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the agent lies in the workspace");
    let target = env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), PathBuf::from);
    let object = target.join("bpf/weft-ebpf");
    let sources = workspace.join("ebpf");
    println!("cargo::rerun-if-env-changed=CARGO_TARGET_DIR");
    println!("cargo::rerun-if-changed={}", sources.display());
    println!("cargo::rerun-if-changed={}", object.display());
    println!("cargo::rustc-env=WEFT_EBPF_OBJECT={}", object.display());

    let Ok(built) = fs::metadata(&object).and_then(|metadata| metadata.modified()) else {
        println!("cargo::error=the BPF object {} is missing: run `cargo xtask build-ebpf`", object.display());
        return;
    };
    let (changed, source) = newest(&sources).expect("the BPF sources can be read");
    if changed > built {
        println!(
            "cargo::error=the BPF object is older than {}: run `cargo xtask build-ebpf`",
            source.display()
        );
    }
}

/// The file below `directory` that changed last.
fn newest(directory: &Path) -> io::Result<(SystemTime, PathBuf)> {
    let mut newest = (SystemTime::UNIX_EPOCH, directory.to_path_buf());
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let candidate = if entry.file_type()?.is_dir() {
            self::newest(&entry.path())?
        } else {
            (entry.metadata()?.modified()?, entry.path())
        };
        newest = newest.max(candidate);
    }
    Ok(newest)
}
