//! Which hook an [`crate::abi::Event`] comes from.

/// connect4/6.
pub const CONNECT: u8 = 1;
/// sendmsg4/6.
pub const SENDMSG: u8 = 2;
/// bind4/6.
pub const BIND: u8 = 3;
/// TC, packets that come from the workload.
pub const FROM_WORKLOAD: u8 = 4;
/// TC, packets that go to the workload.
pub const TO_WORKLOAD: u8 = 5;
/// sockops.
pub const SOCKOPS: u8 = 6;

/// Events of one reason that one CPU may emit within [`RATE_WINDOW_NS`].
pub const RATE_LIMIT: u32 = 100;
/// Window of the rate limit: one second.
pub const RATE_WINDOW_NS: u64 = 1_000_000_000;
