//! What the CA signs and what it refuses, asked by real nodes.

use super::fixture::*;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;
use weft_agent::ca::{self, CaError};
use weft_agent::identity::TrustDomain;

const TTL: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn a_node_joins_and_gets_its_workloads_and_no_others() {
    let ca = TestCa::start().await;
    let node = ca.node("a");
    let store = node.store(TTL, &[CART, DB]);
    let credentials = store.credentials(&id(CART)).await.unwrap();
    assert_eq!(credentials.uri(), CART);
    let error = store.credentials(&id(DB)).await.unwrap_err().to_string();
    assert!(error.contains("place no workload with the identity") && error.contains("on node a"), "{error}");

    // Once joined, the node's certificate proves it: the token is not needed any more.
    std::fs::remove_file(node.config.token.as_ref().unwrap()).unwrap();
    let again = node.store(TTL, &[CART]);
    again.credentials(&id(CART)).await.unwrap();
    assert_eq!(again.status()[0].spiffe, "spiffe://cluster.local/node/a");
}

#[tokio::test]
async fn placement_changes_take_effect_at_once() {
    let ca = TestCa::start().await;
    let node = ca.node("a");
    node.store(TTL, &[CART]).credentials(&id(CART)).await.unwrap();
    ca.placement.send_modify(|placement| {
        let mut next = ca::Placement::clone(placement);
        next.insert(super::fixture::node("a"), ids(&[DB]));
        *placement = next.into();
    });
    node.store(TTL, &[DB]).credentials(&id(DB)).await.unwrap();
    assert!(node.store(TTL, &[CART]).credentials(&id(CART)).await.is_err());
}

#[tokio::test]
async fn tokens_are_good_for_one_node_and_one_key() {
    let ca = TestCa::start().await;
    let node = ca.node("a");
    let token = std::fs::read_to_string(node.config.token.as_ref().unwrap()).unwrap();
    node.store(TTL, &[CART]).credentials(&id(CART)).await.unwrap();

    // The same token with another key.
    let thief = ca.node("a");
    write_token(thief.config.token.as_ref().unwrap(), &token);
    let error = thief.store(TTL, &[CART]).credentials(&id(CART)).await.unwrap_err().to_string();
    assert!(error.contains("was used already"), "{error}");

    // One that others can read.
    let careless = ca.node("a");
    let mode = std::fs::Permissions::from_mode(0o644);
    std::fs::set_permissions(careless.config.token.as_ref().unwrap(), mode).unwrap();
    let error = careless.store(TTL, &[CART]).credentials(&id(CART)).await.unwrap_err().to_string();
    assert!(error.contains("others can read it (mode 644)"), "{error}");

    // The token of one node for another.
    let other = ca.node("b");
    write_token(other.config.token.as_ref().unwrap(), ca.token("a"));
    let error = other.store(TTL, &[DB]).credentials(&id(DB)).await.unwrap_err().to_string();
    assert!(error.contains("node a may not have the identity of node b"), "{error}");

    // An expired and an invented one.
    let late = ca::create_token(ca.dir.path(), &super::fixture::node("b"), Duration::ZERO).unwrap();
    for (token, sentence) in [(late.as_str(), "expired"), ("weft-join-0000", "is unknown here")] {
        let other = ca.node("b");
        write_token(other.config.token.as_ref().unwrap(), token);
        let error = other.store(TTL, &[DB]).credentials(&id(DB)).await.unwrap_err().to_string();
        assert!(error.contains(sentence), "{error}");
    }
}

#[tokio::test]
async fn every_decision_is_written_down_without_secrets() {
    let ca = TestCa::start().await;
    let node = ca.node("a");
    let token = std::fs::read_to_string(node.config.token.as_ref().unwrap()).unwrap();
    let store = node.store(TTL, &[CART, DB]);
    store.credentials(&id(CART)).await.unwrap();
    store.credentials(&id(DB)).await.unwrap_err();

    let audit = ca.audit();
    let lines: Vec<serde_json::Value> =
        audit.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 3, "{audit}");
    assert_eq!((lines[0]["decision"].as_str(), lines[0]["proof"].as_str()), (Some("issued"), Some("token")));
    assert_eq!((lines[1]["node"].as_str(), lines[1]["identity"].as_str()), (Some("a"), Some(CART)));
    assert_eq!((lines[2]["decision"].as_str(), lines[2]["identity"].as_str()), (Some("refused"), Some(DB)));
    assert!(!audit.contains(&token) && !audit.contains("PRIVATE"));
    let mode = ca.dir.path().join("audit.log").metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn keys_are_for_their_owner_only_and_workload_keys_nowhere() {
    let ca = TestCa::start().await;
    let node = ca.node("a");
    node.store(TTL, &[CART]).credentials(&id(CART)).await.unwrap();
    for path in [ca.dir.path().join("root.key"), ca.dir.path().join("intermediate.key")] {
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{path:?}");
    }
    let mut keys = 0;
    for entry in node.config.state_dir.read_dir().unwrap() {
        let path = entry.unwrap().path();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{path:?}");
        keys += std::fs::read_to_string(&path).unwrap().matches("BEGIN PRIVATE KEY").count();
    }
    assert_eq!(keys, 1, "the node's own");

    let exposed = ca.dir.path().join("intermediate.key");
    std::fs::set_permissions(&exposed, std::fs::Permissions::from_mode(0o644)).unwrap();
    assert!(matches!(ca::Authority::open(ca.dir.path()), Err(CaError::Exposed { .. })));
}

#[tokio::test]
async fn init_overwrites_nothing() {
    let dir = tempfile::tempdir().unwrap();
    ca::init(dir.path(), &TrustDomain::default()).unwrap();
    let before = std::fs::read(dir.path().join("root.key")).unwrap();
    assert!(matches!(ca::init(dir.path(), &TrustDomain::default()), Err(CaError::Exists(_))));
    assert_eq!(std::fs::read(dir.path().join("root.key")).unwrap(), before);
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(ca::Authority::open(empty.path()), Err(CaError::Missing(_))));
}

#[tokio::test]
async fn a_workload_certificate_is_no_way_to_the_ca() {
    // A node that shows a workload's certificate, as a compromised pod would.
    let ca = TestCa::start().await;
    let (chain, key) = forge(ca.dir.path(), &[CART], |_| {});
    let reply = super::client::ask_raw(&ca, Some((chain, key)), None).await.unwrap_err();
    assert_eq!(reply.code(), tonic::Code::Unauthenticated);
    assert!(reply.message().contains("only nodes may ask"), "{reply:?}");
}

#[tokio::test]
async fn a_node_certificate_must_be_valid_and_ours() {
    let (ca, elsewhere) = (TestCa::start().await, tempfile::tempdir().unwrap());
    ca::init(elsewhere.path(), &TrustDomain::default()).unwrap();
    let node_a = ["spiffe://cluster.local/node/a"];
    let past = std::time::SystemTime::now() - Duration::from_secs(5);
    let ours = forge(ca.dir.path(), &node_a, |_| {});
    let expired = forge(ca.dir.path(), &node_a, |params| params.not_after = past.into());
    let foreign = forge(elsewhere.path(), &node_a, |_| {});
    super::client::ask_raw(&ca, Some(ours), None).await.unwrap();
    for shown in [expired, foreign] {
        super::client::ask_raw(&ca, Some(shown), None).await.unwrap_err();
    }
    assert_eq!(ca.audit().matches("issued").count(), 1, "{}", ca.audit());
}

#[tokio::test]
async fn nobody_in_particular_is_refused() {
    let ca = TestCa::start().await;
    let reply = super::client::ask_raw(&ca, None, None).await.unwrap_err();
    assert_eq!(reply.code(), tonic::Code::Unauthenticated);
    let reply = super::client::ask_raw(&ca, None, Some("x".repeat(100_000))).await.unwrap_err();
    assert_eq!(reply.code(), tonic::Code::OutOfRange, "{reply:?}");
}

#[tokio::test]
async fn lifetimes_are_bounded() {
    let ca = TestCa::start().await;
    let node = ca.node("a");
    let week = node.store(Duration::from_secs(7 * 86_400), &[CART]);
    let credentials = week.credentials(&id(CART)).await.unwrap();
    let lifetime = credentials.not_after().duration_since(std::time::SystemTime::now()).unwrap();
    assert!(lifetime <= Duration::from_secs(86_400), "{lifetime:?}");
    let unsaid = node.store(Duration::ZERO, &[CART]);
    let credentials = unsaid.credentials(&id(CART)).await.unwrap();
    let lifetime = credentials.not_after().duration_since(std::time::SystemTime::now()).unwrap();
    assert!((Duration::from_secs(3590)..=Duration::from_secs(3600)).contains(&lifetime), "{lifetime:?}");
}
