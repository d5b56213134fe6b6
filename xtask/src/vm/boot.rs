//! Boots a kernel under QEMU and reads what the guest says, until it says no more.
//!
//! Two serial lines: the kernel's console goes to a file, the guest's own lines to QEMU's stdout, so neither cuts the
//! other's lines in two. A panic reboots, and `-no-reboot` turns that into QEMU's end.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::tree;

/// How instructions are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accelerator {
    Kvm,
    Tcg,
}

impl Accelerator {
    fn arguments(self) -> &'static str {
        match self {
            Accelerator::Kvm => "kvm",
            Accelerator::Tcg => "tcg,thread=multi",
        }
    }
}

/// A machine to boot.
pub(crate) struct Machine<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) image: &'a Path,
    pub(crate) accelerator: Accelerator,
    /// Words for the guest, on the kernel's command line.
    pub(crate) words: &'a [String],
    /// The guest is lost when it says nothing for so long.
    pub(crate) silence: Duration,
    /// And when it is not done after this.
    pub(crate) deadline: Duration,
}

/// What was seen.
pub(crate) struct Run {
    /// What the guest said.
    pub(crate) lines: Vec<String>,
    /// What the kernel said.
    pub(crate) console: String,
    /// Why it was killed, if it did not end by itself.
    pub(crate) killed: Option<String>,
    pub(crate) took: Duration,
}

/// A process that does not outlive us.
struct Guest(Child);

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Machine<'_> {
    /// Boots, and hands every line to `tell` as it comes.
    pub(crate) fn run(&self, mut tell: impl FnMut(&str)) -> Result<Run> {
        let console: PathBuf = self.image.with_extension("console");
        // Level 4 is that of the kernel's warnings (`__warn` in kernel/panic.c), and what is shown is below `loglevel`.
        let mut append = "console=ttyS0 panic=-1 oops=panic loglevel=5 watchdog_thresh=30".to_owned();
        self.words.iter().for_each(|word| append.extend([" ", word.as_str()]));
        let qemu = tree::program("qemu-system-x86_64").context("no QEMU; run `cargo xtask setup`")?;
        let begun = Instant::now();
        let mut child = Command::new(qemu)
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .args(["-accel", self.accelerator.arguments(), "-cpu", "max", "-smp", "2", "-m", "1536"])
            .arg("-kernel")
            .arg(self.kernel)
            .arg("-initrd")
            .arg(self.image)
            .args(["-append", &append])
            .args(["-serial", &format!("file:{}", console.display()), "-serial", "stdio"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            // A KVM that does not work says so in hundreds of registers.
            .stderr(if self.accelerator == Accelerator::Kvm { Stdio::null() } else { Stdio::inherit() })
            .spawn()
            .context("cannot start QEMU")?;
        let stdout = BufReader::new(child.stdout.take().expect("piped above"));
        let guest = Guest(child);
        let (send, receive) = channel();
        std::thread::spawn(move || {
            // A guest may say anything, UTF-8 or not.
            stdout
                .split(b'\n')
                .map_while(Result::ok)
                .try_for_each(|line| send.send(String::from_utf8_lossy(&line).trim_end().to_owned()))
        });
        let mut lines = Vec::new();
        let killed = loop {
            let left = self.deadline.saturating_sub(begun.elapsed());
            match receive.recv_timeout(self.silence.min(left)) {
                Ok(line) => {
                    tell(&line);
                    lines.push(line);
                }
                Err(RecvTimeoutError::Disconnected) => break None,
                Err(RecvTimeoutError::Timeout) if begun.elapsed() >= self.deadline => {
                    break Some(format!("not done after {} s", self.deadline.as_secs()));
                }
                Err(RecvTimeoutError::Timeout) => {
                    break Some(format!("silent for {} s", self.silence.as_secs()));
                }
            }
        };
        drop(guest);
        let console = fs::read(&console).with_context(|| format!("cannot read {}", console.display()))?;
        let console = String::from_utf8_lossy(&console).into_owned();
        Ok(Run { lines, console, killed, took: begun.elapsed() })
    }
}
