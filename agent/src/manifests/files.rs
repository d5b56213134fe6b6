//! Reads a directory of manifests: which files count, and what is in them.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// One file may be this long: a Kubernetes object may be 1.5 MiB, and a file may hold many.
pub const MAX_FILE: u64 = 32 << 20;
/// So many files are read; more are reported.
pub const MAX_FILES: usize = 100_000;
/// Directories below the given one are read to this depth.
const MAX_DEPTH: usize = 8;

/// Manifests by path relative to the directory: text, or why there is none. A directory that is not read is one entry.
pub type Files = BTreeMap<String, Result<String, String>>;

/// Is a file that was read before gone? Not if it cannot be read now, or a directory around it.
pub fn is_gone(files: &Files, name: &str) -> bool {
    !Path::new(name).ancestors().any(|path| files.contains_key(&*path.to_string_lossy()))
}

/// What a walk found.
#[derive(Debug, Default)]
pub struct Listing {
    /// Manifest files, relative to the directory, sorted.
    pub files: Vec<PathBuf>,
    /// The directory and those below it.
    pub directories: Vec<PathBuf>,
    /// What may hold manifests and is not read, and why.
    pub unread: BTreeMap<PathBuf, String>,
}

/// Reads every manifest below `dir`. A file that cannot be read is an entry with the reason; only a directory that
/// cannot be listed at all is an error.
pub fn read(dir: &Path) -> io::Result<(Files, Vec<PathBuf>)> {
    let listing = list(dir)?;
    let unread = listing.unread.into_iter();
    let mut files: Files =
        unread.map(|(path, why)| (path.to_string_lossy().into_owned(), Err(why))).collect();
    for (index, path) in listing.files.iter().enumerate() {
        let name = path.to_string_lossy().into_owned();
        if index >= MAX_FILES {
            files.insert(name, Err(format!("not read: the directory holds more than {MAX_FILES} manifests")));
            continue;
        }
        match text(&dir.join(path)) {
            Ok(text) => drop(files.insert(name, Ok(text))),
            // Gone between listing and opening: the same as never seen.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => drop(files.insert(name, Err(format!("cannot be read: {error}")))),
        }
    }
    Ok((files, listing.directories))
}

/// Lists manifests and directories.
///
/// Hidden entries are skipped: editors keep their swap and lock files under such names, and a mounted ConfigMap keeps
/// its versions in `..data`, which the visible files are links into.
pub fn list(dir: &Path) -> io::Result<Listing> {
    let mut listing = Listing::default();
    let mut pending = vec![(PathBuf::new(), 0)];
    while let Some((relative, depth)) = pending.pop() {
        let entries = match fs::read_dir(dir.join(&relative)) {
            Ok(entries) => entries,
            Err(error) if relative.as_os_str().is_empty() => return Err(error),
            // Gone since its name was read: the same as never seen.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => {
                listing.unread.insert(relative, format!("cannot be listed: {error}"));
                continue;
            }
        };
        listing.directories.push(dir.join(&relative));
        for entry in entries {
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) if relative.as_os_str().is_empty() => return Err(error),
                Err(error) => {
                    listing.unread.insert(relative.clone(), format!("cannot be listed: {error}"));
                    break;
                }
            };
            let name = entry.file_name();
            if name.to_string_lossy().starts_with('.') {
                continue;
            }
            let path = relative.join(&name);
            let unread = match entry.file_type() {
                Ok(kind) if kind.is_dir() && depth < MAX_DEPTH => {
                    pending.push((path, depth + 1));
                    continue;
                }
                // So a mounted ConfigMap shows a directory of its present version; such links lead down only.
                Ok(kind) if kind.is_symlink() && depth < MAX_DEPTH && leads_to_version(&entry.path()) => {
                    pending.push((path, depth + 1));
                    continue;
                }
                Ok(kind) if kind.is_dir() => format!("not read: more than {MAX_DEPTH} directories deep"),
                // Links to directories may lead round in circles.
                Ok(kind) if kind.is_symlink() && entry.path().is_dir() => {
                    "not read: a link to a directory; put the directory here, or name it to weft".to_owned()
                }
                Ok(_) if is_manifest(&path) => {
                    listing.files.push(path);
                    continue;
                }
                Ok(_) => continue,
                Err(error) => format!("cannot be read: {error}"),
            };
            listing.unread.insert(path, unread);
        }
    }
    listing.files.sort();
    Ok(listing)
}

/// Is it a link to a directory below `..data`, which itself is hidden?
fn leads_to_version(link: &Path) -> bool {
    let below = |target: PathBuf| target.starts_with("..data") && target.components().count() > 1;
    link.is_dir() && fs::read_link(link).is_ok_and(below)
}

fn is_manifest(path: &Path) -> bool {
    matches!(path.extension().and_then(|e| e.to_str()), Some("yaml" | "yml" | "json"))
}

fn text(path: &Path) -> io::Result<String> {
    let meta = fs::metadata(path)?;
    if !meta.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut text = String::new();
    fs::File::open(path)?.take(MAX_FILE + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("longer than {} MiB", MAX_FILE >> 20),
        ));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_manifests_and_nothing_else() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let put = |name: &str, text: &[u8]| fs::write(dir.path().join(name), text).expect("written");
        fs::create_dir_all(dir.path().join("more/..data")).expect("made");
        put("a.yaml", b"a");
        put("more/b.yml", b"b");
        put("more/..data/hidden.yaml", b"x");
        put(".a.yaml.swp", b"x");
        put(".#a.yaml", b"x");
        put("a.yaml~", b"x");
        put("4913", b"x");
        put("bad.yaml", &[0xff, 0xfe]);
        std::os::unix::fs::symlink("nowhere", dir.path().join("dangling.yaml")).expect("linked");
        let (files, directories) = read(dir.path()).expect("the directory is there");
        assert_eq!(files.keys().collect::<Vec<_>>(), ["a.yaml", "bad.yaml", "more/b.yml"]);
        assert_eq!(files["a.yaml"].as_deref(), Ok("a"));
        assert!(files["bad.yaml"].is_err());
        assert_eq!(directories.len(), 2);
        assert!(read(&dir.path().join("missing")).is_err());
    }

    #[test]
    fn a_directory_that_is_not_read_is_told() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let deep: PathBuf = std::iter::repeat_n("d", MAX_DEPTH + 1).collect();
        fs::create_dir_all(dir.path().join(&deep)).expect("made");
        fs::write(dir.path().join(&deep).join("policy.yaml"), "a").expect("written");
        std::os::unix::fs::symlink("d", dir.path().join("linked")).expect("linked");
        fs::create_dir_all(dir.path().join("..data/sub")).expect("made");
        fs::write(dir.path().join("..data/sub/mounted.yaml"), "a").expect("written");
        std::os::unix::fs::symlink("..data/sub", dir.path().join("sub")).expect("linked");
        std::os::unix::fs::symlink("..data", dir.path().join("all")).expect("linked");
        let (mut files, _) = read(dir.path()).expect("the directory is there");
        assert_eq!(files.remove("sub/mounted.yaml"), Some(Ok("a".to_owned())));
        let told: Vec<&Path> = files.keys().map(Path::new).collect();
        assert_eq!(told, [Path::new("all"), &*deep, Path::new("linked")]);
        assert!(files.values().all(|file| file.as_ref().is_err_and(|why| why.starts_with("not read: "))));
    }

    #[test]
    fn what_cannot_be_read_is_not_gone() {
        let files = Files::from([("more".to_owned(), Err("cannot be listed".to_owned()))]);
        assert!(!is_gone(&files, "more/a.yaml") && !is_gone(&files, "more"));
        assert!(is_gone(&files, "more.yaml") && is_gone(&files, "a/more/b.yaml"));
    }
}
