//! Identity numbers: node-local names for "SPIFFE ID plus labels", handed out by the agent.

/// Nobody in particular: a source that no kernel object and no certificate vouches for.
pub const ANONYMOUS: u32 = 0;
/// A process in the node's own network namespace, such as the kubelet with its probes.
pub const NODE: u32 = 1;
/// The first number for a workload.
pub const FIRST_WORKLOAD: u32 = 16;
/// In a [`crate::abi::PolicyKey`] only: the row for every source without a row of its own.
pub const ANY: u32 = u32::MAX;
