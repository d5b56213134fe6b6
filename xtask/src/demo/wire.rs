//! What a capture on the link between the nodes contains.

use vm_tests::Capture;
use vm_tests::capture::Wire;
use vm_tests::node::LINK;

use super::flow::{http, redis};
use super::ground::Ground;
use super::report::Report;
use super::server::{NGINX, REDIS, SECRET};

/// How often each request is made.
const ROUNDS: usize = 20;

/// Without weft the texts are there: the capture sees what it should.
pub(super) fn before(ground: &Ground, report: &mut Report) {
    let (passed, wire) = traffic(ground);
    let seen = wire.count(SECRET.as_bytes());
    report.check("requests between nodes", passed == 2 * ROUNDS, &format!("{passed} of {}", 2 * ROUNDS));
    report.check("their texts in the capture", seen >= 2 * ROUNDS, &format!("{seen} packets in clear"));
}

/// With weft nothing of them is, and every byte of a workload is in the tunnel.
pub(super) fn after(ground: &Ground, report: &mut Report) {
    let (passed, wire) = traffic(ground);
    let seen = wire.count(SECRET.as_bytes());
    report.check("requests between nodes", passed == 2 * ROUNDS, &format!("{passed} of {}", 2 * ROUNDS));
    report.check("their texts in the capture", seen == 0, &format!("{seen} packets in clear"));
    let outside: usize = wire.outside_tunnel().values().sum();
    report.check("payload outside the tunnel", outside == 0, &format!("{outside} bytes"));
    let inside = wire.in_tunnel();
    report.check("payload inside the tunnel (TLS on 15008)", inside > 0, &format!("{inside} bytes"));
}

/// HTTP and redis requests across the link, and what the link carried meanwhile.
fn traffic(ground: &Ground) -> (usize, Wire) {
    let capture = Capture::start(&ground.nodes[0].place("capture"), LINK);
    let passed = (0..ROUNDS)
        .flat_map(|round| {
            let v = round % 2;
            [
                http(&ground.batch, ground.catalog.addrs()[v], NGINX),
                redis(&ground.frontend, ground.cache.addrs()[v], REDIS),
            ]
        })
        .filter(|answer| answer.passed)
        .count();
    (passed, capture.finish())
}
