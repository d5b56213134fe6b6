//! Connection tracking: one entry per flow and workload interface, whatever the direction of the packet.
//!
//! An entry remembers who began the flow, so that a reply is judged as what it is, and the policy revision under which it
//! was judged, so that a change of policy or of identities (which raises the revision) acts on living flows. Nothing
//! collects entries: the table is an LRU, and a miss decides again.

/// The workload behind the interface began the flow.
pub const OUT: u32 = 1;
/// Its peer did.
pub const IN: u32 = 2;

/// [`crate::abi::FlowState::ingress`] while the peer has not sent anything.
pub const NOT_SEEN: u32 = u32::MAX;
