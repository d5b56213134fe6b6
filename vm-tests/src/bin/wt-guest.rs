//! The first and only service of a guest of `cargo xtask vm-test`: mounts what a system has, loads the modules of the
//! image, runs every scenario in a process of its own under a time limit, says how it went, and ends the machine.
//!
//! It speaks on the second serial line, each line after [`PREFIX`]; `xtask/src/vm/verdict.rs` reads them. Results are exit
//! codes: nothing that a scenario prints can pass for one.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};

const PREFIX: &str = "weft-vm";
const LINE: &str = "/dev/ttyS1";
const SCENARIOS: &str = "/tests/deps";
const SKIPS: &str = "/tmp/skips";
const OUTPUT: &str = "/tmp/output";
/// For one scenario, on an emulated and busy machine.
const LIMIT: Duration = Duration::from_secs(240);
/// Begins the lines of a scenario's output that are for the record.
const FIGURE: &str = "verified ";
/// Lines of a failed scenario's output that are worth reading.
const SHOWN: usize = 60;

/// The serial line to the host.
struct Host(Option<File>);

impl Host {
    fn say(&mut self, word: &str, text: &str) {
        if let Some(file) = &mut self.0 {
            // Nobody could be told of a line that cannot be written; the host takes silence for a failure.
            let _ = writeln!(file, "{PREFIX} {word} {text}");
        }
    }
}

fn main() {
    if std::process::id() != 1 {
        eprintln!("wt-guest is the init of a test machine; run `cargo xtask vm-test`");
        std::process::exit(2);
    }
    let ground = std::panic::catch_unwind(prepare);
    let mut host = Host(File::options().write(true).open(LINE).ok());
    if ground.is_err() {
        host.say("|", "the guest cannot prepare its ground, see the console");
    } else {
        match word("weft.mode").as_deref() {
            Some("hello") => host.say("done", "0 0"),
            Some("hang") => loop {
                sleep(Duration::from_secs(3600));
            },
            Some("panic") => sysrq("c"),
            Some("warn") => {
                fs::write("/dev/kmsg", "<4>WARNING: the guest was told to warn\n").expect("the kernel's log");
                host.say("done", "0 0");
            }
            _ => run_all(&mut host),
        }
    }
    drop(host);
    sysrq("b");
}

/// Acts on the kernel at once: `b` reboots, which ends a machine that may not; `c` crashes.
fn sysrq(key: &str) {
    let _ = fs::write("/proc/sysrq-trigger", key);
    sleep(Duration::from_secs(60));
}

/// The value of a word on the kernel's command line.
fn word(name: &str) -> Option<String> {
    let line = fs::read_to_string("/proc/cmdline").ok()?;
    line.split_whitespace().find_map(|word| Some(word.strip_prefix(name)?.strip_prefix('=')?.to_owned()))
}

/// File systems, modules, `lo`.
fn prepare() {
    let none = None::<&str>;
    for (kind, path) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("tmpfs", "/run"),
        ("cgroup2", "/sys/fs/cgroup"),
        ("bpf", "/sys/fs/bpf"),
        ("tracefs", "/sys/kernel/tracing"),
    ] {
        let mounted = mount(Some(kind), path, Some(kind), MsFlags::empty(), none);
        mounted.unwrap_or_else(|e| panic!("mount {kind} at {path}: {e}"));
    }
    fs::create_dir_all("/run/netns").expect("make /run/netns");
    for module in sorted("/modules") {
        let file = File::open(&module).expect("the image has its modules");
        finit_module(&file, c"", ModuleInitFlags::empty())
            .unwrap_or_else(|e| panic!("load {}: {e}", module.display()));
    }
    let status = Command::new("/bin/ip").args(["link", "set", "lo", "up"]).status().expect("start ip");
    assert!(status.success(), "lo stays down");
}

fn sorted(dir: &str) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(dir)
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    paths.sort();
    paths
}

fn run_all(host: &mut Host) {
    let filter = word("weft.filter").unwrap_or_default();
    let (mut passed, mut failed) = (0_u32, 0_u32);
    for program in sorted(SCENARIOS) {
        let file = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let listed = tests(&program).unwrap_or_else(|why| {
            failed += 1;
            show(host, &why);
            host.say("fail", &format!("{file} does not list its scenarios"));
            Vec::new()
        });
        for test in listed {
            let name = format!("{file} {test}");
            if !name.contains(&filter) {
                continue;
            }
            host.say("begin", &name);
            let begun = Instant::now();
            let result = run(&program, &test);
            for line in fs::read_to_string(SKIPS).unwrap_or_default().lines() {
                host.say("skip", line);
            }
            let _ = fs::remove_file(SKIPS);
            let took = format!("{name} ({} s)", begun.elapsed().as_secs());
            match result {
                Ok(()) => {
                    passed += 1;
                    let output = fs::read_to_string(OUTPUT).unwrap_or_default();
                    let figures = output.lines().filter(|line| line.starts_with(FIGURE));
                    figures.for_each(|line| host.say("|", line));
                    host.say("pass", &took);
                }
                Err(why) => {
                    failed += 1;
                    show(host, &why);
                    host.say("fail", &took);
                }
            }
        }
    }
    host.say("done", &format!("{passed} {failed}"));
}

/// The names of the tests in a program, one at least.
fn tests(program: &Path) -> Result<Vec<String>, String> {
    let output = Command::new(program).args(["--list", "--format", "terse"]).output();
    let output = output.map_err(|e| format!("start {}: {e}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let names: Vec<String> =
        text.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect();
    if !output.status.success() || names.is_empty() {
        return Err(format!(
            "{} names {} tests and ends with {}",
            program.display(),
            names.len(),
            output.status
        ));
    }
    Ok(names)
}

/// Runs one test to its end or its limit.
fn run(program: &Path, test: &str) -> Result<(), String> {
    let output = File::create(OUTPUT).map_err(|e| format!("create {OUTPUT}: {e}"))?;
    let error = output.try_clone().map_err(|e| format!("share {OUTPUT}: {e}"))?;
    let mut child = Command::new(program)
        // Some are only for a guest, and ignored elsewhere.
        .args(["--exact", test, "--include-ignored", "--nocapture", "--test-threads=1"])
        .env("PATH", "/bin")
        .env("HOME", "/root")
        .env("WEFT_VM", "1")
        .env("WEFT_SKIPS", SKIPS)
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(error)
        .spawn()
        .map_err(|e| format!("start {}: {e}", program.display()))?;
    let end = Instant::now() + LIMIT;
    loop {
        match child.try_wait().map_err(|e| format!("wait: {e}"))? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => return Err(status.to_string()),
            None if Instant::now() > end => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("not done after {} s", LIMIT.as_secs()));
            }
            None => sleep(Duration::from_millis(10)),
        }
    }
}

/// Shows why a scenario failed, with the end of what it printed.
fn show(host: &mut Host, why: &str) {
    host.say("|", why);
    let text = fs::read(OUTPUT).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    for line in lines.iter().skip(lines.len().saturating_sub(SHOWN)) {
        host.say("|", line);
    }
}
