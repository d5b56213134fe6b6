//! The machine that a scenario runs on: its kernel, and whether that is emulated.

/// Is this the host's kernel, on which times mean something? An emulated machine shows outcomes only.
pub fn on_host() -> bool {
    std::env::var_os("WEFT_VM").is_none()
}

/// How many of something that is repeated: all on the host's kernel, a fiftieth on an emulated machine, where each takes up to
/// a hundred times as long.
pub fn repeats(count: u64) -> u64 {
    if on_host() { count } else { count.div_ceil(50) }
}

/// `major.minor` of the running kernel.
pub fn kernel() -> String {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a kernel has a release");
    release.trim().split('.').take(2).collect::<Vec<_>>().join(".")
}
