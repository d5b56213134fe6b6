//! Scenarios with real sockets on a real kernel: nodes and pods are network namespaces, workloads are processes of
//! `wt-load`, and the agent is the real one.
//!
//! The harness does not know how weft works. It builds the ground (namespaces, veths, routes, cgroups, a bpffs),
//! starts programs on it, and looks at what comes out of sockets and wires.
//!
//! INVARIANT: nothing here touches an interface, a qdisc or a cgroup that the harness did not make.

pub mod agent;
pub mod capture;
pub mod cgroup;
pub mod leftovers;
pub mod machine;
pub mod manifests;
pub mod mesh;
pub mod netns;
pub mod node;
pub mod process;
pub mod skip;
pub mod verifier;

pub use agent::{Agent, Ca};
pub use capture::Capture;
pub use machine::{on_host, repeats};
pub use manifests::Manifests;
pub use mesh::Mesh;
pub use node::{Node, Pod};
pub use process::{Place, Process};
