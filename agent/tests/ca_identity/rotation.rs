//! A second root joins, signs, and the first one leaves; connections work at each step.

use super::fixture::*;
use std::time::Duration;
use weft_agent::ca;
use weft_agent::identity::TrustDomain;

const TTL: Duration = Duration::from_secs(3600);

#[tokio::test]
async fn roots_overlap_while_one_replaces_the_other() {
    let ca = TestCa::start().await;
    let node = ca.node("a");
    let store = node.store(TTL, &[CART]);
    store.credentials(&id(CART)).await.unwrap();
    assert_eq!(store.roots().certificates().len(), 1);

    let next = tempfile::tempdir().unwrap();
    ca::init(next.path(), &TrustDomain::default()).unwrap();
    let (old_root, new_root) = (ca.root(), root_of(next.path()));
    let copied = ca.dir.path().join("roots").join(new_root.file_name().unwrap());
    std::fs::copy(&new_root, &copied).unwrap();

    // Both are trusted, the first still signs.
    let store = node.store(TTL, &[CART]);
    store.credentials(&id(CART)).await.unwrap();
    assert_eq!(store.roots().certificates().len(), 2);

    // The second signs. The node's certificate is under the first, its --ca-root names the first: both still work.
    for name in ["intermediate.key", "intermediate.pem"] {
        std::fs::copy(next.path().join(name), ca.dir.path().join(name)).unwrap();
    }
    let store = node.store(TTL, &[CART]);
    let credentials = store.credentials(&id(CART)).await.unwrap();
    let second = std::fs::read_to_string(&new_root).unwrap();
    let roots = weft_agent::identity::Roots::from_pem(second.as_bytes()).unwrap();
    let name = weft_agent::identity::certificate::Facts::read(&roots.certificates()[0]).unwrap().subject;
    assert_eq!(credentials.issuers().last(), Some(&name));

    // The first leaves; a node that has renewed under the second goes on.
    let mut fresh = ca.node("a");
    fresh.config.ca_root = copied;
    fresh.store(TTL, &[CART]).credentials(&id(CART)).await.unwrap();
    std::fs::remove_file(old_root).unwrap();
    let store = fresh.store(TTL, &[CART]);
    store.credentials(&id(CART)).await.unwrap();
    assert_eq!(store.roots().certificates().len(), 1);
}
