//! Which kinds weft knows, and what it does with each.

use super::fields::{At, Findings};
use super::yaml::{Node, Value};
use super::{Meta, Spec, admin, cilium, core, jwt, network, security};
use crate::error::Severity;

/// What happens to an object of some kind.
pub(super) enum Treatment {
    Used(&'static str),
    /// Routes requests: checked for references, carried out by the HTTP engine.
    Routing,
    /// Not the mesh's business.
    Ignored,
    /// Not known, or not enforceable; with the sentence that says so.
    Unknown(String),
}

const CORE: &[&str] = &["Namespace", "Pod", "Service", "ServiceAccount"];
const IGNORED_CORE: &[&str] = &[
    "ConfigMap",
    "Secret",
    "Node",
    "Event",
    "PersistentVolume",
    "PersistentVolumeClaim",
    "LimitRange",
    "ResourceQuota",
    "ReplicationController",
    "Endpoints",
];
const IGNORED_GROUPS: &[&str] = &[
    "apps",
    "batch",
    "autoscaling",
    "policy",
    "rbac.authorization.k8s.io",
    "storage.k8s.io",
    "scheduling.k8s.io",
    "coordination.k8s.io",
    "apiextensions.k8s.io",
    "admissionregistration.k8s.io",
    "monitoring.coreos.com",
];
const ROUTING: &[&str] = &[
    "VirtualService",
    "Gateway",
    "ServiceEntry",
    "WorkloadEntry",
    "WorkloadGroup",
    "Sidecar",
    "ProxyConfig",
    "HTTPRoute",
    "GRPCRoute",
    "TCPRoute",
    "TLSRoute",
    "UDPRoute",
    "ReferenceGrant",
    "GatewayClass",
    "Telemetry",
    "Ingress",
    "IngressClass",
];

const ADMIN: &str = "policy.networking.k8s.io";

pub(super) fn treatment(version: &str, kind: &str) -> Treatment {
    let (group, version) = version.split_once('/').unwrap_or(("", version));
    let used = |name: &'static str, versions: &[&str]| {
        if versions.contains(&version) {
            return Treatment::Used(name);
        }
        Treatment::Unknown(format!(
            "{kind} of version {version:?} is not known; use {}",
            versions.join(" or ")
        ))
    };
    match (group, kind) {
        ("", _) if IGNORED_CORE.contains(&kind) => Treatment::Ignored,
        ("", _) => match CORE.iter().find(|known| **known == kind) {
            Some(known) => used(known, &["v1"]),
            None => Treatment::Unknown(format!("no kind {kind:?} is known in apiVersion {version:?}")),
        },
        ("discovery.k8s.io", "EndpointSlice") => used("EndpointSlice", &["v1", "v1beta1"]),
        ("security.istio.io", "AuthorizationPolicy") => used("AuthorizationPolicy", &["v1", "v1beta1"]),
        ("security.istio.io", "PeerAuthentication") => used("PeerAuthentication", &["v1", "v1beta1"]),
        ("security.istio.io", "RequestAuthentication") => used("RequestAuthentication", &["v1", "v1beta1"]),
        ("networking.k8s.io", "NetworkPolicy") => used("NetworkPolicy", &["v1"]),
        ("cilium.io", "CiliumNetworkPolicy") => used("CiliumNetworkPolicy", &["v2"]),
        ("cilium.io", "CiliumClusterwideNetworkPolicy") => used("CiliumClusterwideNetworkPolicy", &["v2"]),
        (ADMIN, "AdminNetworkPolicy") => used("AdminNetworkPolicy", &["v1alpha1"]),
        (ADMIN, "BaselineAdminNetworkPolicy") => used("BaselineAdminNetworkPolicy", &["v1alpha1"]),
        (ADMIN, "ClusterNetworkPolicy") => used("ClusterNetworkPolicy", &["v1beta1", "v1alpha2"]),
        ("networking.istio.io", "DestinationRule") => used("DestinationRule", &["v1", "v1beta1", "v1alpha3"]),
        (
            "networking.istio.io" | "gateway.networking.k8s.io" | "telemetry.istio.io" | "networking.k8s.io",
            _,
        ) if ROUTING.contains(&kind) => Treatment::Routing,
        _ if is_policy(&format!("{group}/"), kind) => Treatment::Unknown(format!(
            "{kind} is not enforceable yet; what it selects is refused, so remove it"
        )),
        ("cilium.io" | "networking.k8s.io", _) => Treatment::Ignored,
        _ if IGNORED_GROUPS.contains(&group) => Treatment::Ignored,
        _ => Treatment::Unknown(format!("no kind {kind:?} is known in apiVersion \"{group}/{version}\"")),
    }
}

/// Does an object of this group and kind restrict traffic? Either may be unreadable, and empty. In doubt it does.
pub(super) fn is_policy(version: &str, kind: &str) -> bool {
    let group = version.split_once('/').map_or("", |(group, _)| group);
    match group {
        "security.istio.io" | "policy.networking.k8s.io" => true,
        "cilium.io" => !OTHERS_OF_CILIUM.contains(&kind),
        "networking.k8s.io" => !["Ingress", "IngressClass", "IPAddress", "ServiceCIDR"].contains(&kind),
        "" if version.is_empty() => kind.ends_with("Policy") || kind.ends_with("Authentication"),
        // A slip in `apiVersion` must not make a policy go away. Other makers have kinds of the same names, which are unknown here.
        _ => {
            let near = |part: &&str| group.contains(*part);
            (group.is_empty()
                || IGNORED_GROUPS.contains(&group)
                || ["istio", "cilium", "k8s.io"].iter().any(near))
                && POLICIES.iter().any(|name| kind.ends_with(name))
        }
    }
}

/// How the kinds that restrict traffic end.
const POLICIES: &[&str] =
    &["NetworkPolicy", "AuthorizationPolicy", "PeerAuthentication", "RequestAuthentication"];

/// Kinds of Cilium's group that restrict no traffic.
const OTHERS_OF_CILIUM: &[&str] = &[
    "CiliumBGPAdvertisement",
    "CiliumBGPClusterConfig",
    "CiliumBGPNodeConfig",
    "CiliumBGPNodeConfigOverride",
    "CiliumBGPPeerConfig",
    "CiliumBGPPeeringPolicy",
    "CiliumCIDRGroup",
    "CiliumEgressGatewayPolicy",
    "CiliumEndpoint",
    "CiliumEndpointSlice",
    "CiliumExternalWorkload",
    "CiliumGatewayClassConfig",
    "CiliumIdentity",
    "CiliumL2AnnouncementPolicy",
    "CiliumLoadBalancerIPPool",
    "CiliumLocalRedirectPolicy",
    "CiliumNode",
    "CiliumNodeConfig",
    "CiliumPodIPPool",
];

pub(super) fn has_namespace(kind: &str) -> bool {
    const CLUSTER: &[&str] = &[
        "Namespace",
        "Node",
        "PersistentVolume",
        "GatewayClass",
        "IngressClass",
        "ClusterRole",
        "ClusterRoleBinding",
        "CustomResourceDefinition",
        "StorageClass",
        "PriorityClass",
        "AdminNetworkPolicy",
        "BaselineAdminNetworkPolicy",
        "ClusterNetworkPolicy",
        "CiliumClusterwideNetworkPolicy",
        "ValidatingWebhookConfiguration",
        "MutatingWebhookConfiguration",
    ];
    !CLUSTER.contains(&kind)
}

/// Is an object of this kind in the namespace `default` when it names none? Of a kind that is not known to be, nobody can tell.
pub(super) fn is_never_clusterwide(version: &str, kind: &str) -> bool {
    const SPACED: &[&str] = &[
        "AuthorizationPolicy",
        "PeerAuthentication",
        "RequestAuthentication",
        "NetworkPolicy",
        "CiliumNetworkPolicy",
    ];
    let group = version.split_once('/').map_or("", |(group, _)| group);
    matches!(group, "security.istio.io" | "networking.k8s.io") || SPACED.contains(&kind)
}

/// Does a text that cannot be read speak of what [`is_policy`] knows?
pub(super) fn mentions_policy(text: &str) -> bool {
    // `policy.networking.k8s.io` ends in the last, as does the group of Gateway API.
    let groups = ["security.istio.io/v", "cilium.io/v", "networking.k8s.io/v"];
    let mut found = groups.iter().flat_map(|group| text.match_indices(group));
    found.any(|(at, _)| !text[..at].ends_with("gateway.")) || POLICIES.iter().any(|kind| text.contains(kind))
}

/// Does a text that cannot be read speak of a namespace as an object?
pub(super) fn mentions_namespace(text: &str) -> bool {
    ["kind: Namespace", "\"Namespace\""].iter().any(|kind| text.contains(kind))
}

/// Do policies select by what an object of this kind says of a namespace?
pub(super) fn gives_labels(version: &str, kind: &str) -> bool {
    kind == "Namespace" && !version.contains('/')
}

/// Is it the kind of a list of objects? Few objects that are none are called so too, and those have no `items`.
pub(super) fn is_list(kind: &str) -> bool {
    kind.ends_with("List")
}

pub(super) fn read(treatment: &Treatment, meta: &Meta, node: &Node, out: &mut Findings) -> Spec {
    let Treatment::Used(kind) = treatment else { return recognised(treatment, node, out) };
    let mut top = At::new(node, "").fields(out);
    top.ignore(&["apiVersion", "kind", "metadata"]);
    let spec = match *kind {
        "Namespace" => {
            top.ignore(&["spec", "status"]);
            Spec::Namespace
        }
        "ServiceAccount" => {
            top.ignore(&["secrets", "imagePullSecrets", "automountServiceAccountToken"]);
            Spec::ServiceAccount
        }
        "Pod" => Spec::Pod(core::pod(meta, top.take("spec"), top.take("status"), out)),
        "Service" => {
            top.ignore(&["status"]);
            Spec::Service(core::service(top.take("spec"), out))
        }
        "EndpointSlice" => Spec::EndpointSlice(core::endpoint_slice(meta, &mut top, out)),
        "DestinationRule" => {
            top.ignore(&["status"]);
            Spec::DestinationRule(core::destination_rule(top.take("spec"), out))
        }
        "PeerAuthentication" => {
            top.ignore(&["status"]);
            Spec::PeerAuthentication(security::peer_authentication(top.take("spec"), out))
        }
        "RequestAuthentication" => {
            top.ignore(&["status"]);
            let spec = top.take("spec");
            Spec::RequestAuthentication(jwt::request_authentication(&meta.object.namespace, spec, out))
        }
        "NetworkPolicy" => {
            top.ignore(&["status"]);
            Spec::Network(network::network_policy(meta, top.take("spec"), out))
        }
        "AdminNetworkPolicy" => {
            top.ignore(&["status"]);
            Spec::Network(admin::admin_network_policy(meta, top.take("spec"), out))
        }
        "BaselineAdminNetworkPolicy" => {
            top.ignore(&["status"]);
            Spec::Network(admin::baseline_admin_network_policy(meta, top.take("spec"), out))
        }
        "ClusterNetworkPolicy" => {
            top.ignore(&["status"]);
            Spec::Network(admin::cluster_network_policy(meta, top.take("spec"), out))
        }
        "CiliumNetworkPolicy" | "CiliumClusterwideNetworkPolicy" => {
            top.ignore(&["status"]);
            Spec::Network(cilium::policy(meta, &mut top, out))
        }
        _ => {
            top.ignore(&["status"]);
            Spec::AuthorizationPolicy(security::authorization_policy(meta, top.take("spec"), out))
        }
    };
    top.finish(out);
    spec
}

fn recognised(treatment: &Treatment, node: &Node, out: &mut Findings) -> Spec {
    if !matches!(treatment, Treatment::Routing) {
        out.add(Severity::Note, node.line, "", "recognised and ignored: the mesh has no use for it");
        return Spec::Ignored;
    }
    out.add(Severity::Warning, node.line, "", "not carried out yet: routing needs the HTTP engine");
    let mut hosts = Vec::new();
    if let Some(spec) = node.get("spec") {
        destinations(&At::new(spec, "spec"), &mut hosts, out);
    }
    Spec::Routing { hosts }
}

/// Finds every `destination: {host: ...}` below a node. The parser bounds the depth.
fn destinations(at: &At<'_>, hosts: &mut Vec<String>, out: &mut Findings) {
    let mut quiet = Findings::default();
    match &at.node.value {
        Value::Sequence(_) => at.items(&mut quiet).iter().for_each(|item| destinations(item, hosts, out)),
        Value::Mapping(_) => {
            for (key, inner) in at.entries(&mut quiet) {
                if key == "destination" || key == "mirror" {
                    hosts.extend(inner.node.get("host").and_then(Node::text).map(str::to_owned));
                    if let Some(weight) = inner.node.get("weight") {
                        let message =
                            "taken as the route's weight; it belongs beside `destination`, not inside it";
                        out.add(Severity::Warning, weight.line, &format!("{}.weight", inner.path), message);
                    }
                }
                destinations(&inner, hosts, out);
            }
        }
        _ => {}
    }
}
