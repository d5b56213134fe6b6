//! What a kernel lacks is found by trying, replaced, and named.

use serde_json::Value;
use vm_tests::mesh::{dial, worked};
use vm_tests::{Mesh, Process, machine};

/// First kernel that has it, in order of `weft status`, as (major, minor).
const SINCE: [(u32, u32); 4] = [(6, 6), (6, 1), (5, 15), (5, 14)];

#[test]
fn status_names_what_is_used_in_place_of_what_is_missing() {
    let mut mesh = Mesh::one();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(0, "b"));
    mesh.start();
    let _server = Process::serve(&b.place, "whoami=[::]:8080");
    assert!(worked(&dial(&a, &b.at4(8080))));

    let output = mesh.agents[0].ask("status -o json");
    let status: Value = serde_json::from_slice(&output.stdout).expect("`weft status -o json` prints JSON");
    let features = status["features"].as_array().expect("features");
    assert_eq!(features.len(), SINCE.len(), "{status}");
    let kernel = machine::kernel();
    let mut numbers = kernel.split('.').map(|number| number.parse::<u32>().expect("a kernel's number"));
    let kernel = (numbers.next().expect("major"), numbers.next().expect("minor"));
    // Debian's kernels are as their numbers say; the agent itself never looks at them.
    for (feature, since) in features.iter().zip(SINCE) {
        assert_eq!(feature["present"], kernel >= since, "{feature} on {kernel:?}");
        assert_eq!(feature["instead"] == "", kernel >= since, "{feature} on {kernel:?}");
    }
    // Two workloads, a program in each direction, and the eleven hooks of the cgroup: by links or by filters.
    let links = status["links"].as_array().expect("links");
    assert_eq!(links.len(), 11 + 2 * 2, "{status}");
}
