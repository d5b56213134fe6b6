//! Which backend of a service takes the next connection. Decided once, in the connect hook.

/// Backends in turn.
pub const ROUND_ROBIN: u32 = 1;
/// The less loaded of two backends picked at random (as Envoy's LEAST_REQUEST).
pub const LEAST_CONNECTIONS: u32 = 2;
