//! HBONE, the tunnel's protocol: HTTP/2 CONNECT inside mutual TLS, one stream per connection of an application.
//!
//! Sizes are those of Istio's ztunnel but for the connection's window: ours lets every stream fill its own. A smaller one
//! is used up by a few applications that do not read, and then nobody's bytes pass until they do.

use std::fmt::Write as _;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use h2::{Ping, PingPong};
use http::header::{FORWARDED, HeaderName, HeaderValue};
use http::{HeaderMap, Method, Request, Uri};
use weft_datapath::names::is_agent_port;

use super::view::Workload;

/// Bytes that one stream may have under way.
pub(super) const STREAM_WINDOW: u32 = 4 << 20;
/// Bytes that all streams of a connection may have under way. See [`super::copy::Budget`] for what bounds the sum.
pub(super) const CONNECTION_WINDOW: u32 = CLIENT_STREAMS as u32 * STREAM_WINDOW;
/// Longest frame we take.
pub(super) const FRAME: u32 = 1 << 20;
/// Longest header block we take.
pub(super) const HEADER_LIST: u32 = 64 << 10;
/// Streams that a peer may have open on one connection.
pub(super) const SERVER_STREAMS: u32 = 200;
/// Streams that we open on one connection before we open another connection.
pub(super) const CLIENT_STREAMS: usize = 100;
/// What waits inside the HTTP/2 connection per stream before its writer is stopped.
pub(super) const SEND_BUFFER: usize = 256 << 10;

/// Why a CONNECT was refused, for the agent at the other end to log.
pub(super) const REASON: HeaderName = HeaderName::from_static("weft-reason");
const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// The request that opens a tunnel from `source`, whose application has the address `client`, to `target`.
pub(super) fn request(source: &Workload, client: SocketAddr, target: SocketAddr) -> Request<()> {
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.uri_mut() = authority(target);
    let mut header = |name: HeaderName, value: String| {
        // Names come from manifests; one that does not fit into a header is left out, it is telemetry only.
        if let Ok(value) = HeaderValue::try_from(value) {
            request.headers_mut().insert(name, value);
        }
    };
    header(BAGGAGE, baggage(source));
    header(FORWARDED, format!("for=\"{client}\""));
    header(TRACEPARENT, traceparent());
    request
}

/// `ip:port` is a valid authority in both families.
fn authority(target: SocketAddr) -> Uri {
    let mut parts = http::uri::Parts::default();
    parts.authority = Some(target.to_string().parse().expect("a socket address is an authority"));
    Uri::from_parts(parts).expect("an authority alone is a URI")
}

/// W3C Baggage: values are percent-encoded where they must be.
fn baggage(workload: &Workload) -> String {
    let mut text = String::new();
    for (key, value) in [
        ("k8s.namespace.name", &workload.namespace),
        ("k8s.pod.name", &workload.name),
        ("service.name", &workload.service),
    ] {
        if value.is_empty() {
            continue;
        }
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(key);
        text.push('=');
        for byte in value.bytes() {
            if byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b'/' | b':') {
                text.push(byte.into());
            } else {
                let _ = write!(text, "%{byte:02X}");
            }
        }
    }
    text
}

/// W3C Trace Context, version 00, not sampled: nothing records spans yet, but what the peers log can be joined.
fn traceparent() -> String {
    static SEED: OnceLock<RandomState> = OnceLock::new();
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let seed = SEED.get_or_init(RandomState::new);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let part = |which: u8| seed.hash_one((number, which)).max(1);
    format!("00-{:016x}{:016x}-{:016x}-00", part(0), part(1), part(2))
}

/// Where a CONNECT to one of `own` addresses wants to go; the sentence why not, else.
pub(super) fn target<B>(request: &Request<B>, own: &[IpAddr]) -> Result<SocketAddr, String> {
    if request.method() != Method::CONNECT {
        return Err(format!("{} is not CONNECT", request.method()));
    }
    let authority = request.uri().authority().ok_or("no :authority")?.as_str();
    let target: SocketAddr = authority.parse().map_err(|_| "the :authority is not an address and a port")?;
    let target = super::sock::canonical(target);
    if !own.contains(&target.ip()) {
        return Err(format!("{} is not an address of this workload", target.ip()));
    }
    if target.port() == 0 || is_agent_port(target.port()) {
        return Err(format!("port {} cannot be a destination", target.port()));
    }
    Ok(target)
}

/// The port in `forwarded: for="ip:port"`. Only the port: the address is that of the tunnel, which was verified.
pub(super) fn client_port(headers: &HeaderMap) -> Option<u16> {
    let value = headers.get(FORWARDED)?.to_str().ok()?;
    let node = value.split([';', ',']).find_map(|pair| {
        let (key, value) = pair.trim().split_once('=')?;
        key.eq_ignore_ascii_case("for").then_some(value)
    })?;
    node.trim_matches('"').parse::<SocketAddr>().ok().map(|addr| addr.port()).filter(|port| *port != 0)
}

/// A header value that says why, shortened, with what HTTP does not allow replaced.
pub(super) fn reason_value(text: &str) -> HeaderValue {
    let clean: String =
        text.chars().take(256).map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' }).collect();
    HeaderValue::try_from(clean).unwrap_or(HeaderValue::from_static("unknown"))
}

/// Pings every `pause`; resolves when an answer took longer than `limit`, so the peer or the path is gone.
pub(super) async fn lost(pings: Option<PingPong>, pause: Duration, limit: Duration) {
    let Some(mut pings) = pings else { return std::future::pending().await };
    loop {
        tokio::time::sleep(pause).await;
        match tokio::time::timeout(limit, pings.ping(Ping::opaque())).await {
            Ok(Ok(_)) => {}
            // The connection itself reports its end; only silence is news.
            Ok(Err(_)) => std::future::pending().await,
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload() -> Workload {
        Workload {
            namespace: "shop".into(),
            name: "cart-1".into(),
            service: "cart, the 1st".into(),
            identity: "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap(),
            addresses: vec!["10.1.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
        }
    }

    #[test]
    fn what_one_side_asks_the_other_understands() {
        let own = workload().addresses;
        for (client, to) in [("10.2.0.1:4711", "10.1.0.1:80"), ("[fd00::2]:4711", "[fd00::1]:80")] {
            let request = request(&workload(), client.parse().unwrap(), to.parse().unwrap());
            assert_eq!(request.uri().to_string(), to);
            assert_eq!(target(&request, &own), Ok(to.parse().unwrap()));
            assert_eq!(client_port(request.headers()), Some(4711));
            let baggage = request.headers()["baggage"].to_str().unwrap();
            assert_eq!(
                baggage,
                "k8s.namespace.name=shop,k8s.pod.name=cart-1,service.name=cart%2C%20the%201st"
            );
            assert_eq!(request.headers()["traceparent"].len(), 55);
        }
    }

    #[test]
    fn a_request_for_something_else_is_refused() {
        let own = workload().addresses;
        for authority in
            ["10.1.0.2:80", "10.1.0.1:15008", "10.1.0.1:15001", "10.1.0.1:15006", "10.1.0.1:0", "cart:80"]
        {
            let mut request = Request::new(());
            *request.method_mut() = Method::CONNECT;
            *request.uri_mut() = authority.parse().unwrap();
            assert!(target(&request, &own).is_err(), "{authority}");
        }
        let get = Request::get("http://10.1.0.1:80/").body(()).unwrap();
        assert!(target(&get, &own).is_err());
    }

    #[test]
    fn only_the_port_of_forwarded_is_read() {
        for (value, port) in [
            ("for=\"10.0.0.1:99\";host=shop", Some(99)),
            ("proto=http;FOR=\"[fd00::1]:98\"", Some(98)),
            ("for=10.0.0.1", None),
            ("for=\"10.0.0.1:0\"", None),
            ("by=1.2.3.4", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(FORWARDED, value.parse().unwrap());
            assert_eq!(client_port(&headers), port, "{value}");
        }
    }
}
