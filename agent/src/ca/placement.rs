//! Which identities run on which node, read from the same manifests that the agents read.

use super::decide::Placement;
use crate::identity::{NodeName, SpiffeId, TrustDomain};
use crate::manifests::files::{self, Files};
use crate::manifests::watch::Watch;
use anyhow::Context;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::watch;
use tracing::{info, warn};
use weft_policy::{Model, ObjectStore, Settings};

/// Where a model's workloads are. Workloads without a node, and names that no certificate can carry, are left out: what
/// is not placed is not signed.
pub fn placement(model: &Model) -> Placement {
    let mut placement = Placement::new();
    for workload in model.workloads().iter().filter(|workload| workload.enrolled) {
        let node = workload.node.as_deref().and_then(|node| node.parse::<NodeName>().ok());
        let id = workload.identity.spiffe.to_string().parse::<SpiffeId>().ok();
        if let (Some(node), Some(id)) = (node, id) {
            placement.entry(node).or_default().insert(id);
        }
    }
    placement
}

/// Reads a directory of manifests and keeps reading it as it changes. A file that turned unreadable keeps its objects.
pub struct Manifests {
    dir: PathBuf,
    settings: Settings,
    store: ObjectStore,
    texts: BTreeMap<String, String>,
    told: BTreeSet<String>,
}

impl Manifests {
    pub fn new(dir: PathBuf, trust_domain: &TrustDomain) -> Manifests {
        let settings = Settings { trust_domain: trust_domain.as_str().into(), ..Settings::default() };
        Manifests { dir, settings, store: ObjectStore::new(), texts: BTreeMap::new(), told: BTreeSet::new() }
    }

    /// The placement as the files are now. Blocks on them.
    pub fn read(&mut self) -> anyhow::Result<Placement> {
        let (files, _) = files::read(&self.dir).with_context(|| self.dir.display().to_string())?;
        self.take(files);
        // Placement is made from nothing each time.
        self.store.take_changed();
        Ok(placement(&self.store.model(self.settings.clone())))
    }

    /// Publishes each change; ends with an error only when changes cannot be noticed at all.
    pub async fn follow(mut self, placement: watch::Sender<Arc<Placement>>) -> anyhow::Result<()> {
        let mut changes = Watch::new().context("changes of manifests cannot be watched")?;
        loop {
            let dir = self.dir.clone();
            // Watched before it is read, so that no change falls between.
            match tokio::task::spawn_blocking(move || files::list(&dir)).await? {
                Ok(listing) => changes.cover(&listing.directories),
                Err(error) => warn!("{}: {error}; what was read before stays in force", self.dir.display()),
            }
            let read = tokio::task::spawn_blocking(move || {
                let result = self.read();
                (self, result)
            });
            let (back, result) = read.await?;
            self = back;
            match result {
                Ok(next) => {
                    placement.send_if_modified(|current| {
                        let changed = **current != next;
                        if changed {
                            let workloads: usize = next.values().map(BTreeSet::len).sum();
                            info!("manifests place {workloads} identities on {} nodes", next.len());
                            *current = Arc::new(next);
                        }
                        changed
                    });
                }
                Err(error) => warn!("{error:#}; what was read before stays in force"),
            }
            changes.changed().await.context("changes of manifests cannot be watched")?;
        }
    }

    fn take(&mut self, files: Files) {
        let gone: Vec<String> =
            self.texts.keys().filter(|name| files::is_gone(&files, name)).cloned().collect();
        for name in gone {
            self.store.remove(&name);
            self.texts.remove(&name);
        }
        let mut problems = BTreeSet::new();
        for (name, text) in files {
            match text {
                Ok(text) if self.texts.get(&name) == Some(&text) => {}
                Ok(text) => {
                    self.store.apply(&name, &text);
                    self.texts.insert(name, text);
                }
                Err(why) => drop(problems.insert(format!("{name}: {why}"))),
            }
        }
        // Once each: the directory is read often.
        problems.difference(&self.told).for_each(|problem| warn!("{problem}"));
        self.told = problems;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "
apiVersion: v1
kind: Pod
metadata: {name: cart-0, namespace: shop}
spec: {nodeName: a, serviceAccountName: cart, containers: [{name: c, image: i}]}
status: {podIP: 10.0.0.1}
";

    #[test]
    fn pods_are_placed_where_they_run() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("pod.yaml"), POD).unwrap();
        let mut manifests = Manifests::new(dir.path().to_owned(), &TrustDomain::default());
        let cart: SpiffeId = "spiffe://cluster.local/ns/shop/sa/cart".parse().unwrap();
        let expected = Placement::from([("a".parse().unwrap(), [cart].into())]);
        assert_eq!(manifests.read().unwrap(), expected);
        std::fs::remove_file(dir.path().join("pod.yaml")).unwrap();
        assert_eq!(manifests.read().unwrap(), Placement::new());
        drop(dir);
        assert!(manifests.read().is_err());
    }

    #[tokio::test]
    async fn changes_are_followed() {
        let dir = tempfile::tempdir().unwrap();
        let manifests = Manifests::new(dir.path().to_owned(), &TrustDomain::default());
        let (sender, mut placement) = watch::channel(Arc::default());
        let following = tokio::spawn(manifests.follow(sender));
        std::fs::write(dir.path().join("pod.yaml"), POD).unwrap();
        let wait = placement.wait_for(|placement| !placement.is_empty());
        tokio::time::timeout(std::time::Duration::from_secs(5), wait).await.unwrap().unwrap();
        following.abort();
    }
}
