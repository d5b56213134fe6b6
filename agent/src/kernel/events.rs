//! What the programs tell: events one by one, counters by sum.

use std::collections::BTreeMap;
use std::io;
use std::ops::AddAssign;
use std::time::Duration;

use aya::maps::{MapData, RingBuf};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use weft_datapath::abi::{Event, Meter, MeterKey, TcpKey, TcpStats};
use weft_datapath::reason::Reason;

use super::error::{Error, Result};
use super::load::Kernel;
use super::maps::Maps;
use super::sys;

/// How often the ring is looked at when nothing wakes. The rate limit lets 64 CPUs fill it in 1 s.
const LOOK: Duration = Duration::from_millis(100);

/// The events of the datapath as they happen. Each event is delivered to one stream only.
pub struct Events {
    ring: AsyncFd<RingBuf<MapData>>,
}

impl Events {
    /// Must be called within a tokio runtime.
    pub fn open(kernel: &Kernel) -> Result<Events> {
        let ring = kernel.ring()?;
        // SAFETY: the ring owns its map's descriptor, always names the same one, and gives no access to replace it.
        let ring = unsafe { AsyncFd::register_with_interest(ring, Interest::READABLE) }.map_err(|error| {
            let map = weft_datapath::names::map::EVENTS;
            Error::Map { map, action: "watch", source: error.into() }
        })?;
        Ok(Events { ring })
    }

    /// The next event. Dropping the future loses none.
    pub async fn next(&mut self) -> io::Result<Event> {
        loop {
            // Looked at before waiting: readiness is told by edges.
            while let Some(record) = self.ring.get_mut().next() {
                // A record of another length comes from a program of another ABI; it cannot be told what it says.
                if record.len() == size_of::<Event>() {
                    return Ok(sys::from_bytes(&record));
                }
            }
            // Accepted flows do not wake this task, refusals do.
            if let Ok(ready) = tokio::time::timeout(LOOK, self.ring.readable_mut()).await {
                ready?.clear_ready();
            }
        }
    }
}

/// Refusals so far, by reason; reasons that never happened are left out.
pub fn drops(maps: &Maps) -> Result<BTreeMap<Reason, u64>> {
    let mut drops = BTreeMap::new();
    for reason in Reason::ALL {
        let count = maps.drops.lookup(&u32::from(*reason as u8))?.unwrap_or_default().iter().sum();
        if count != 0 {
            drops.insert(*reason, count);
        }
    }
    Ok(drops)
}

/// Packets and bytes so far, by identity pair and direction.
pub fn meters(maps: &Maps) -> Result<BTreeMap<MeterKey, Meter>> {
    Ok(sums(maps.meter.entries()?))
}

/// TCP connections of the direct path so far.
pub fn tcp(maps: &Maps) -> Result<BTreeMap<TcpKey, TcpStats>> {
    Ok(sums(maps.tcp.entries()?))
}

fn sums<K: Ord, V: Default>(entries: Vec<(K, Vec<V>)>) -> BTreeMap<K, V>
where
    Sum<V>: AddAssign<V>,
{
    let total = |values: Vec<V>| {
        let mut sum = Sum(V::default());
        values.into_iter().for_each(|value| sum += value);
        sum.0
    };
    entries.into_iter().map(|(key, values)| (key, total(values))).collect()
}

/// A total in the making.
struct Sum<V>(V);

impl AddAssign<Meter> for Sum<Meter> {
    fn add_assign(&mut self, Meter { packets, bytes }: Meter) {
        self.0.packets += packets;
        self.0.bytes += bytes;
    }
}

impl AddAssign<TcpStats> for Sum<TcpStats> {
    fn add_assign(&mut self, value: TcpStats) {
        let TcpStats { opened, closed, sent, received, retransmits, srtt_us } = value;
        self.0.opened += opened;
        self.0.closed += closed;
        self.0.sent += sent;
        self.0.received += received;
        self.0.retransmits += retransmits;
        self.0.srtt_us += srtt_us;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_all_cpus_add_up() {
        let key = MeterKey { source: 16, destination: 17, direction: 0 };
        let values = vec![Meter { packets: 1, bytes: 10 }, Meter { packets: 2, bytes: 20 }];
        let sums = sums(vec![(key, values)]);
        assert_eq!(sums[&key], Meter { packets: 3, bytes: 30 });
    }
}
