//! Processes inside a namespace and a cgroup, and their output as lines of JSON.
//!
//! `wt-load exec` enters both and then becomes the program, so every socket is created there, as in a real pod.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// How long a line may take that must come.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// Where a process runs.
#[derive(Clone, Debug)]
pub struct Place {
    /// File of the network namespace.
    pub netns: PathBuf,
    /// Directory of the cgroup.
    pub cgroup: PathBuf,
}

/// A running process, killed on drop. It also dies with the thread that started it.
#[derive(Debug)]
pub struct Process {
    what: String,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Process {
    /// Starts `program`; its stderr goes to `log`, or to ours.
    pub fn spawn(place: &Place, program: &Path, args: &[&str], log: Option<File>) -> Process {
        let mut child = Command::new(binary("wt-load"))
            .arg("exec")
            .arg(&place.netns)
            .arg(&place.cgroup)
            .arg(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log.map_or_else(Stdio::inherit, Stdio::from))
            .spawn()
            .expect("start wt-load");
        let stdout = BufReader::new(child.stdout.take().expect("piped above"));
        let (send, lines) = channel();
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| send.send(line)));
        let what =
            format!("{} {}", program.file_name().unwrap_or_default().to_string_lossy(), args.join(" "));
        Process { what, stdin: child.stdin.take(), child, lines }
    }

    /// Starts `wt-load` with these words as arguments.
    pub fn load(place: &Place, words: &str) -> Process {
        let args: Vec<&str> = words.split_whitespace().collect();
        Process::spawn(place, &binary("wt-load"), &args, None)
    }

    /// Starts `wt-load serve` and waits until it listens.
    pub fn serve(place: &Place, words: &str) -> Process {
        let mut server = Process::load(place, &format!("serve {words}"));
        server.line();
        server
    }

    /// The next line, which must come.
    pub fn line(&mut self) -> Value {
        self.line_within(DEADLINE).unwrap_or_else(|| panic!("no line from `{}` in {DEADLINE:?}", self.what))
    }

    /// The next line if it comes in time. Panics when the process ended without one.
    pub fn line_within(&mut self, timeout: Duration) -> Option<Value> {
        match self.lines.recv_timeout(timeout) {
            Ok(line) => Some(
                serde_json::from_str(&line).unwrap_or_else(|e| panic!("`{}` said {line}: {e}", self.what)),
            ),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                let status = self.child.wait().expect("wait for a child");
                panic!("`{}` ended with {status} and no further line", self.what)
            }
        }
    }

    /// Writes a line to its stdin.
    pub fn tell(&mut self, line: &str) {
        writeln!(self.stdin.as_mut().expect("piped in spawn"), "{line}").expect("write to a process");
    }

    /// Asks a server for its totals.
    pub fn totals(&mut self) -> Value {
        self.tell("totals");
        self.line()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).expect("process ids fit");
        let _ = kill(Pid::from_raw(pid), signal);
    }

    /// Waits for the end.
    pub fn wait(&mut self, timeout: Duration) -> Option<ExitStatus> {
        let end = Instant::now() + timeout;
        loop {
            match self.child.try_wait().expect("wait for a child") {
                Some(status) => return Some(status),
                None if Instant::now() > end => return None,
                None => sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Kills it with SIGKILL and waits.
    pub fn kill9(&mut self) {
        self.signal(Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill9();
    }
}

/// Runs `wt-load` to its end and returns its last line.
pub fn load(place: &Place, words: &str) -> Value {
    let mut process = Process::load(place, words);
    process.line()
}

/// A program of this workspace: `WT_LOAD`, `WEFT_BIN` and the like, else beside the running test.
pub fn binary(name: &str) -> PathBuf {
    let variable = if name == "weft" { "WEFT_BIN".to_owned() } else { name.replace('-', "_").to_uppercase() };
    if let Some(path) = std::env::var_os(&variable) {
        return path.into();
    }
    let exe = std::env::current_exe().expect("the path of this program");
    exe.ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("no `{name}` beside {}: build it, or set {variable}", exe.display()))
}
