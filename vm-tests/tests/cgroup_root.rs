//! The hooks on the root of the cgroup hierarchy, where an agent attaches by default. Only in a guest of the kernel
//! matrix, which runs ignored tests too: on a machine that somebody works on, a mistake here cuts off everybody.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use vm_tests::mesh::{dial, worked};
use vm_tests::{Mesh, Process, cgroup, on_host};

/// Two workloads of one node, one of which may not reach the other: by a call that is refused, and by packets.
fn redirects_and_refuses(root: &Path) {
    assert!(!on_host(), "this attaches to the root of the cgroup hierarchy: only in a guest");
    assert!(!root.join("cgroup.type").exists(), "{} is not the root", root.display());
    let mut mesh = Mesh::two();
    let (a, b, c, far) = (mesh.pod(0, "a"), mesh.pod(0, "b"), mesh.pod(0, "c"), mesh.pod(1, "far"));
    for to in [&b, &far] {
        mesh.allow(to, &[&a], &[]);
    }
    mesh.start_with(&["--cgroup", root.to_str().expect("our own paths are UTF-8")]);
    let _servers = [&b, &far].map(|pod| Process::serve(&pod.place, "whoami=[::]:8080"));
    for to in [&b, &far] {
        for target in [to.at4(8080), to.at6(8080)] {
            let passed = dial(&a, &target);
            assert!(worked(&passed), "a to {target}: {passed}");
            let refused = dial(&c, &format!("{target} --timeout-ms 2000"));
            assert!(!worked(&refused), "c to {target}: {refused}");
        }
    }
    // The hook refused, not only TC: the call itself says so.
    let refused = dial(&c, &b.at4(8080));
    assert!(refused["connect"] == "ECONNREFUSED" || refused["connect"] == "EPERM", "{refused}");
}

#[test]
#[ignore = "attaches to the root of the cgroup hierarchy: only in a guest"]
fn the_unified_hierarchy() {
    redirects_and_refuses(&cgroup::mount().expect("the guest has mounted cgroup2"));
}

#[test]
#[ignore = "attaches to the root of the cgroup hierarchy: only in a guest"]
fn beside_controllers_of_version_one() {
    // As systemd's hybrid mode: controllers of v1 in hierarchies of their own, v2 without controllers at `unified`.
    let base = Path::new("/run/hybrid");
    let mounts = Mounts(["cpu", "net_cls,net_prio", "unified"].map(|name| base.join(name)).to_vec());
    for (path, kind, options) in [
        (&mounts.0[0], "cgroup", Some("cpu")),
        (&mounts.0[1], "cgroup", Some("net_cls,net_prio")),
        (&mounts.0[2], "cgroup2", None),
    ] {
        fs::create_dir_all(path).expect("make a mount point");
        let mounted = mount(Some(kind), path, Some(kind), MsFlags::empty(), options);
        mounted.unwrap_or_else(|e| panic!("mount {kind} at {}: {e}", path.display()));
    }
    redirects_and_refuses(&mounts.0[2]);
}

/// Mounts that go when the scenario ends.
struct Mounts(Vec<PathBuf>);

impl Drop for Mounts {
    fn drop(&mut self) {
        for path in &self.0 {
            let _ = umount2(path, MntFlags::MNT_DETACH);
        }
    }
}
