//! Writes the archive that a kernel unpacks as its first root: cpio in the "newc" form.
//!
//! <https://docs.kernel.org/driver-api/early-userspace/buffer-format.html>: headers in ASCII hex, names and contents
//! padded to four bytes, `TRAILER!!!` at the end.

use std::collections::BTreeSet;

const DIR: u32 = 0o040_755;
const FILE: u32 = 0o100_755;
const LINK: u32 = 0o120_777;
const CHARACTER: u32 = 0o020_600;

/// An archive being written.
pub(crate) struct Cpio {
    bytes: Vec<u8>,
    known: BTreeSet<String>,
    inode: u32,
}

impl Cpio {
    /// Empty.
    pub(crate) fn new() -> Cpio {
        Cpio { bytes: Vec::new(), known: BTreeSet::new(), inode: 0 }
    }

    /// Has something of this name been added?
    pub(crate) fn has(&self, path: &str) -> bool {
        self.known.contains(name(path))
    }

    /// Adds a directory and those above it.
    pub(crate) fn dir(&mut self, path: &str) {
        let path = name(path);
        if path.is_empty() || self.known.contains(path) {
            return;
        }
        self.parents(path);
        self.entry(path, DIR, (0, 0), &[]);
    }

    /// Adds an executable file, and the directories above it.
    pub(crate) fn file(&mut self, path: &str, content: &[u8]) {
        self.parents(name(path));
        self.entry(name(path), FILE, (0, 0), content);
    }

    /// Adds a symbolic link.
    pub(crate) fn link(&mut self, path: &str, target: &str) {
        self.parents(name(path));
        self.entry(name(path), LINK, (0, 0), target.as_bytes());
    }

    /// Adds a character device.
    pub(crate) fn device(&mut self, path: &str, major: u32, minor: u32) {
        self.parents(name(path));
        self.entry(name(path), CHARACTER, (major, minor), &[]);
    }

    /// The archive.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.dir(parent);
        }
    }

    fn entry(&mut self, path: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        self.known.insert(path.to_owned());
        self.inode += 1;
        let size = |length: usize| u32::try_from(length).expect("no file of ours has 4 GiB");
        let links = if mode == DIR { 2 } else { 1 };
        // inode, mode, uid, gid, links, mtime, size, device of the file system, device, length of the name, checksum
        let fields = [
            self.inode,
            mode,
            0,
            0,
            links,
            0,
            size(content.len()),
            0,
            0,
            major,
            minor,
            size(path.len() + 1),
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// Names in the archive have no slash in front.
fn name(path: &str) -> &str {
    path.trim_matches('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_known_archive() {
        let mut cpio = Cpio::new();
        cpio.file("/a/b", b"hello");
        assert!(cpio.has("/a") && cpio.has("a/b"));
        let bytes = cpio.finish();
        let text = String::from_utf8(bytes.clone()).unwrap();
        // The directory comes before what is in it.
        let directory = "070701\
            00000001000041ed00000000000000000000000200000000000000000000000000000000000000000000000000000002\
            00000000a\0";
        assert_eq!(&text[..directory.len()], directory);
        let file = text.find("a/b\0").unwrap();
        assert_eq!(&text[file + 4..].trim_start_matches('\0')[..5], "hello");
        assert!(text.trim_end_matches('\0').ends_with("TRAILER!!!"));
        assert_eq!(bytes.len() % 4, 0);
    }

    #[test]
    fn headers_are_aligned() {
        let mut cpio = Cpio::new();
        cpio.file("dir/file", b"12345");
        cpio.link("dir/link", "file");
        cpio.device("dev/null", 1, 3);
        // Each header is 110 bytes and begins with the magic number, at a multiple of four.
        let bytes = cpio.finish();
        let headers = (0..bytes.len()).step_by(4).filter(|at| bytes[*at..].starts_with(b"070701")).count();
        assert_eq!(headers, 6);
    }
}
