//! What is wrong with network policies of all languages (tests/problems/network.txt): each error names file, document,
//! line, object and field, and what the object would have selected is refused.

use weft_policy::{ObjectStore, Settings, Severity};

/// The document before the object under test, so that neither its number nor its first line is 1.
const BEFORE: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: n}\n---\n";

fn version(object: &str) -> &'static str {
    let kind = object.strip_prefix("kind: ").and_then(|rest| rest.lines().next()).unwrap();
    match kind {
        "NetworkPolicy" => "networking.k8s.io/v1",
        "ClusterNetworkPolicy" => "policy.networking.k8s.io/v1alpha2",
        _ if kind.starts_with("Cilium") => "cilium.io/v2",
        _ => "policy.networking.k8s.io/v1alpha1",
    }
}

#[test]
fn every_refusal_says_where_and_what() {
    let mut count = 0;
    for case in include_str!("problems/network.txt").split("\n== ").skip(1) {
        let (title, body) = case.split_once('\n').unwrap();
        let (object, lines) = body.split_once("\n--\n").unwrap();
        // The version comes last, so that lines count as in the file of cases.
        let text = format!("{BEFORE}{object}\napiVersion: {}\n", version(object));
        let first = BEFORE.lines().count() as u32;
        let kind = object.lines().next().unwrap().trim_start_matches("kind: ");
        let name = if object.contains("namespace: n}") { "n/p" } else { "p" };

        let mut store = ObjectStore::new();
        store.apply("f.yaml", &text);
        let problems = store.check(Settings::default());
        let errors: Vec<String> =
            problems.iter().filter(|p| p.severity == Severity::Error).map(ToString::to_string).collect();
        let (refused, errors): (Vec<_>, Vec<_>) =
            errors.into_iter().partition(|error| error.contains("refuse all traffic until"));
        let mut expected: Vec<String> = Vec::new();
        for line in lines.lines().filter(|line| !line.is_empty()) {
            let (number, rest) = line.split_once(' ').unwrap();
            let number = number.parse::<u32>().unwrap() + first;
            expected.push(format!("f.yaml:{number}: error: document 2, {kind} {name}, {rest}"));
        }
        count += expected.len();
        let sorted = |mut list: Vec<String>| {
            list.sort();
            list
        };
        assert_eq!(sorted(errors).join("\n"), sorted(expected).join("\n"), "{title}");
        let nodes_only = object.contains("nodeSelector") && !object.contains("endpointSelector");
        assert_eq!(refused.len(), usize::from(!nodes_only), "{title}: {refused:?}");
    }
    assert!(count > 120, "{count}");
}

#[test]
fn http_that_nothing_can_see_yet_is_a_warning() {
    let rule = "toPorts: [{ports: [{port: \"80\", protocol: TCP}], rules: {http: [{path: /}]}}]";
    let text = format!(
        "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {{name: p}}\nspec: {{endpointSelector: {{}}, ingress: [{{{rule}}}]}}\n"
    );
    let mut store = ObjectStore::new();
    store.apply("f.yaml", &text);
    let problems: Vec<String> = store.check(Settings::default()).iter().map(ToString::to_string).collect();
    assert_eq!(
        problems,
        [
            "f.yaml:1: warning: document 1, CiliumNetworkPolicy default/p, spec: rules with HTTP attributes need the HTTP engine; \
          until it runs, flows that they would decide are refused"
        ]
    );
}

#[test]
fn what_cannot_see_pods_outside_the_mesh_is_a_warning() {
    let policy = |name: &str, rules: &str| {
        format!(
            "---\napiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {{name: {name}}}\nspec: {{endpointSelector: {{}}, \
             {rules}}}\n"
        )
    };
    let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: out, labels: {istio.io/dataplane-mode: none, app: x}}\nstatus: \
                {podIP: 10.0.0.1}\n"
        .to_owned()
        + &policy("a", "ingressDeny: [{fromEndpoints: [{matchLabels: {app: y}}]}, {fromEndpoints: [{matchLabels: {app: x}}]}]")
        + &policy("b", "egress: [{toEntities: [world]}]")
        + &policy("c", "ingress: [{fromEndpoints: [{}]}], egressDeny: [{toEntities: [world]}]");
    let mut store = ObjectStore::new();
    store.apply("f.yaml", &text);
    let problems = store.check(Settings::default());
    let why = |object: &str, what: &str| {
        format!(
            "CiliumNetworkPolicy default/{object}: {what} default/out: a pod with the label istio.io/dataplane-mode: none is an \
             address outside to weft, without labels; remove that label, or write a range of addresses"
        )
    };
    let told: Vec<String> = problems
        .iter()
        .filter(|problem| problem.field == "spec" && problem.message.contains("dataplane-mode"))
        .map(|problem| format!("{}: {}", problem.object.as_ref().unwrap(), problem.message))
        .collect();
    assert_eq!(told, [why("a", "ingressDeny[1] does not hold for"), why("b", "egress[0] holds for")]);
}

#[test]
fn two_policies_of_one_priority_are_a_warning() {
    let policy = |kind: &str, name: &str, version: &str, tier: &str| {
        format!(
            "apiVersion: policy.networking.k8s.io/{version}\nkind: {kind}\nmetadata: {{name: {name}}}\nspec: {{{tier}priority: 5, \
             subject: {{namespaces: {{}}}}, ingress: [{{action: Deny, from: [{{namespaces: {{}}}}]}}]}}\n---\n"
        )
    };
    let text = policy("ClusterNetworkPolicy", "b", "v1alpha2", "tier: Admin, ")
        + &policy("AdminNetworkPolicy", "a", "v1alpha1", "")
        + &policy("ClusterNetworkPolicy", "c", "v1alpha2", "tier: Baseline, ");
    let mut store = ObjectStore::new();
    store.apply("f.yaml", &text);
    let problems: Vec<String> = store.check(Settings::default()).iter().map(ToString::to_string).collect();
    assert_eq!(
        problems,
        [
            "f.yaml:1: warning: document 1, ClusterNetworkPolicy b, spec.priority: the same priority as AdminNetworkPolicy a, which \
          goes first because of its name; others may do it differently, so give it one of its own"
        ]
    );
}
