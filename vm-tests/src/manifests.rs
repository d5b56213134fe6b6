//! The directory of manifests that the agents watch, and builders for what the scenarios put into it.

use std::fs;
use std::path::{Path, PathBuf};

use crate::leftovers::Dir;
use crate::netns;
use crate::node::Pod;

/// A directory of YAML files, one object each.
#[derive(Debug)]
pub struct Manifests {
    dir: Dir,
}

impl Manifests {
    /// An empty directory.
    pub fn create() -> Manifests {
        Manifests { dir: Dir::create("manifests") }
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Writes a file as a whole: a watcher never reads half of it.
    pub fn put(&self, name: &str, text: &str) {
        // The name does not end in .yaml, so the agent does not take the draft for a manifest.
        let draft = self.path().join(format!(".{name}.draft"));
        fs::write(&draft, text).unwrap_or_else(|e| panic!("write {}: {e}", draft.display()));
        fs::rename(&draft, self.file(name)).unwrap_or_else(|e| panic!("rename {}: {e}", draft.display()));
    }

    /// Removes a file.
    pub fn remove(&self, name: &str) {
        fs::remove_file(self.file(name)).unwrap_or_else(|e| panic!("remove {name}: {e}"));
    }

    /// Writes the `Pod` of a pod: namespace `default`, service account and label `app` of its own name.
    pub fn pod(&self, pod: &Pod) {
        self.put(&format!("pod-{}", pod.name), &self::pod(pod, "default"));
    }

    /// Writes a `PeerAuthentication` for the whole mesh.
    pub fn mode(&self, mode: &str) {
        self.put("mode", &peer_authentication(mode));
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path().join(format!("{name}.yaml"))
    }
}

/// A `Pod`. The annotation is how an agent without Kubernetes finds its network namespace.
pub fn pod(pod: &Pod, namespace: &str) -> String {
    let Pod { name, node, v4, v6, .. } = pod;
    let netns = Path::new(netns::DIR).join(pod.netns().name());
    format!(
        "apiVersion: v1
kind: Pod
metadata:
  name: {name}
  namespace: {namespace}
  labels:
    app: {name}
  annotations:
    weft.dev/netns: {netns}
spec:
  nodeName: {node}
  serviceAccountName: {name}
  containers:
  - name: main
    image: none
status:
  phase: Running
  podIP: {v4}
  podIPs:
  - ip: {v4}
  - ip: \"{v6}\"
",
        netns = netns.display()
    )
}

/// A `Service` in front of the pods with label `app: NAME`.
pub fn service(name: &str, app: &str, vip: &str, port: u16, target: u16, protocol: &str) -> String {
    format!(
        "apiVersion: v1
kind: Service
metadata:
  name: {name}
  namespace: default
spec:
  clusterIP: \"{vip}\"
  clusterIPs: [\"{vip}\"]
  selector:
    app: {app}
  ports:
  - name: main
    port: {port}
    targetPort: {target}
    protocol: {protocol}
"
    )
}

/// A `PeerAuthentication` of the root namespace.
pub fn peer_authentication(mode: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata:
  name: default
  namespace: istio-system
spec:
  mtls:
    mode: {mode}
"
    )
}

/// A `PeerAuthentication` for one workload with a mode of its own for one port.
pub fn port_mode(app: &str, mode: &str, port: u16, port_mode: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata:
  name: {app}
  namespace: default
spec:
  selector:
    matchLabels:
      app: {app}
  mtls:
    mode: {mode}
  portLevelMtls:
    {port}:
      mode: {port_mode}
"
    )
}

/// An `AuthorizationPolicy` for the pods with label `app`: each of `rules` is the YAML of one rule, on one line.
pub fn authorization(name: &str, app: &str, action: &str, rules: &[&str]) -> String {
    let rules: String = rules.iter().map(|rule| format!("  - {rule}\n")).collect();
    let rules = if rules.is_empty() { "  rules: []\n".to_owned() } else { format!("  rules:\n{rules}") };
    format!(
        "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: {name}
  namespace: default
spec:
  selector:
    matchLabels:
      app: {app}
  action: {action}
{rules}"
    )
}

/// A rule: these pods may reach these ports (none: every port).
pub fn from_pods(pods: &[&Pod], ports: &[u16]) -> String {
    let principals: Vec<String> =
        pods.iter().map(|pod| format!("\"cluster.local/ns/default/sa/{}\"", pod.name)).collect();
    let from = format!("from: [{{source: {{principals: [{}]}}}}]", principals.join(", "));
    if ports.is_empty() {
        return format!("{{{from}}}");
    }
    let ports: Vec<String> = ports.iter().map(|port| format!("\"{port}\"")).collect();
    format!("{{{from}, to: [{{operation: {{ports: [{}]}}}}]}}", ports.join(", "))
}
