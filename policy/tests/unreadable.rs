//! What cannot be read is never taken for absent, nor for another object.

mod mesh;

use mesh::{policy, store, verdicts};
use weft_policy::Verdict::{Allow as A, Deny as D};
use weft_policy::{ObjectStore, Settings};

/// A policy of namespace `prod` that denies everything, and the same as its author breaks it.
const DENY: &str = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: d, namespace: prod}\n\
     spec: {action: DENY, rules: [{}]}\n";

fn broken(metadata: &str) -> String {
    let broken = DENY.replace("metadata: {name: d, namespace: prod}\n", metadata).replace("[{}]}", "[{}]");
    assert!(broken.contains(metadata) && !broken.contains("[{}]}"));
    broken
}

/// What a namespace is called decides which object a document is; one that is there and cannot be read is not `default`.
#[test]
fn an_unreadable_namespace_is_not_an_absent_one() {
    for text in [
        broken("metadata: {name: d,\n  namespace: prod}\n"),
        broken("metadata:\n  name: d\n  \"namespace\": prod\n"),
        broken("metadata:\n  name: d\n  namespace: &ns prod\n"),
        broken("metadata:\n  name: d\n  namespace: !!str prod\n"),
        broken("metadata:\n  name: d\n  namespace : prod\n"),
        broken("metadata:\n  name: d\n   namespace: prod\n"),
        broken("metadata:\n    name: d\n  namespace: prod\n"),
        broken("metadata:\n  name: d\n\tnamespace: prod\n"),
        broken("metadata:\n  name: d\n  namespace:\n    prod\n"),
        broken("metadata:\n  name: d\n  namespace: prod\n  namespace: prod\n"),
        broken("metadata:\n  name: d\n  labels: {a: [b,\n  namespace: c\n  ]}\n  namespace : prod\n"),
        broken("metadata: {name: d, labels: {namespace: x}, \"namespace\": prod}\n"),
        broken("metadata: &m {name: d, namespace: prod}\n"),
        broken("\"metadata\": {name: d, namespace: prod}\n"),
        broken("metadta: {name: d, namespace: prod}\n"),
        broken("metadata: {name: d, namespace: prod}\n").replace("kind: Auth", "kind: &k Auth"),
        broken("metadata: {name: d, namespace: prod}\n") + "---\n\n" + DENY.trim_end_matches("}\n"),
        // Without the marker between them, two documents are one that has every key twice.
        "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: d}\n".to_owned() + DENY,
        // These are YAML.
        DENY.replace("namespace: prod", "namespace: [prod]"),
        DENY.replace("namespace: prod", "namespace: {prod: }"),
        DENY.replace("namespace: prod", "namespace: \"prod \""),
        DENY.replace("namespace: prod", "nameSpace: prod"),
        DENY.replace("namespace: prod", "namepace: prod"),
        DENY.replace("namespace: prod", "namepsace: prod"),
        DENY.replace("namespace: prod", "nmaespace: prod"),
        DENY.replace("metadata: {name: d, namespace: prod}", "metadata:\n  name: d\nnamespace: prod"),
        broken("metadata:\n  name: d\n  namepsace: prod\n"),
        DENY.replace("metadata", "metdata"),
        DENY.replace("apiVersion", "apiversion"),
        format!("- {}", DENY.trim_end().replace('\n', "\n  ")),
    ] {
        let mut store = store();
        store.apply("p.yaml", DENY);
        assert_eq!(verdicts(&store), [A, A, D], "{text}");
        let problems = format!("{:?}", store.apply("p.yaml", &text));
        assert!(problems.contains("Error"), "{text}");
        assert_eq!(verdicts(&store)[2], D, "after a good version: {text}\n{problems}");
        store.remove("p.yaml");
        store.apply("p.yaml", &text);
        assert_eq!(verdicts(&store)[2], D, "from nothing: {text}\n{problems}");
    }
}

/// What is written plainly is believed, whatever stands around it.
#[test]
fn a_readable_namespace_is_believed() {
    for text in [
        broken("metadata: {name: d, namespace: prod}\n"),
        broken("metadata: {labels: {namespace: x}, name: 'd', namespace: \"prod\"} # here\n"),
        broken("metadata:\n  # here\n  name: d # d\n  namespace: prod\r\n\n  labels: {namespace: x}\n"),
        broken("metadata:\n  annotations:\n    a: '{\"namespace\":\"x\"}'\n  name: d\n  namespace: prod\n"),
        DENY.replace("rules", "rulez"),
    ] {
        let mut store = store();
        store.apply("p.yaml", &text);
        assert_eq!(verdicts(&store), [A, A, D], "from nothing: {text}");
        store.apply("p.yaml", DENY);
        let problems = store.apply("p.yaml", &text);
        assert!(
            problems.iter().any(|p| p.to_string().contains("AuthorizationPolicy prod/d: stays")),
            "{text}"
        );
    }
}

#[test]
fn a_new_policy_without_a_name_is_not_taken_for_another_object() {
    let account = "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: x, namespace: prod}\n";
    let unnamed = DENY.replace("name: d", "generateName: d-");
    let elsewhere = DENY.replace("namespace: prod", "namespace: default");
    for (before, now, expected) in [
        (account.to_owned(), unnamed.clone(), [A, A, D]),
        (elsewhere.clone(), unnamed.clone(), [D, D, D]),
        // It may be the one that was there, and then the other one is not.
        (
            DENY.replace("rules: [{}]", "rules: [{to: [{operation: {ports: [\"81\"]}}]}]"),
            unnamed.clone(),
            [A, A, A],
        ),
        (
            DENY.replace("rules: [{}]", "rules: [{to: [{operation: {ports: [\"81\"]}}]}]"),
            format!("{unnamed}---\n{unnamed}"),
            [A, A, D],
        ),
    ] {
        let mut store = store();
        store.apply("p.yaml", &before);
        let problems = store.apply("p.yaml", &now);
        assert!(problems.iter().any(|p| p.message.contains("stays in its former version")), "{problems:?}");
        assert_eq!(verdicts(&store), expected, "{before} -> {now}");
    }
}

#[test]
fn a_policy_in_a_text_that_cannot_be_told_apart_refuses_everything() {
    let json = "{\"apiVersion\": \"security.istio.io/v1\", \"kind\": \"AuthorizationPolicy\",\n \"metadata\": {\"name\": \"d\", \
                \"namespace\": \"prod\"}, \"spec\": {\"action\": \"DENY\", \"rules\": [{}]}}\n";
    let unnamed = |kind: &str| {
        format!(
            "apiVersion: cilium.io/v2\nkind: {kind}\nmetadata: {{generateName: c-}}\nspec: {{endpointSelector: {{}}, ingress: [{{}}]}}\n"
        )
    };
    let list = |items: &str| {
        format!("apiVersion: v1\nkind: List\nitems:\n- {}\n", items.trim_end().replace('\n', "\n  "))
    };
    for text in [
        json.replace("[{}]}}", "[{}]}"),
        format!("{json}{json}"),
        DENY.replace("[{}]}", "[{}]").lines().map(|line| format!("  {line}\n")).collect(),
        list(DENY).replace("[{}]}", "[{}]"),
        list(DENY).replace("items", "itemz"),
        list(DENY).replace("- apiVersion", "  apiVersion"),
        list(DENY)
            .replace("apiVersion: v1", "apiVersion: security.istio.io/v1")
            .replace("kind: List", "kind: AuthorizationPolicyList")
            .replace("[{}]}", "[{}]"),
        unnamed("CiliumClusterwideNetworkPolicy"),
        unnamed("CiliumClusterwideNetworkPolicy").replace("[{}]}", "[{}]"),
        unnamed("CiliumUnheardOfPolicy"),
        unnamed("CiliumUnheardOfPolicy").replace("generateName", "name"),
        unnamed("X").replace("kind: X\n", ""),
        "{\"kind\": \"AuthorizationPolicy\", \"spec\": {]}\n".to_owned(),
        DENY.replace("security.istio.io/v1", "networking.k8s.io/v1")
            .replace("AuthorizationPolicy", "Networkpolicy")
            .replace(", namespace: prod", ", namespace: [prod]"),
    ] {
        let mut store = store();
        store.apply("p.yaml", &text);
        assert_eq!(verdicts(&store), [D, D, D], "{text}");
    }
    // Nothing of this is a policy.
    for text in [
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c}\ndata: {a: \"security.istio.io/v1\", b: [}\n",
        "  apiVersion: v1\n  kind: ServiceAccount\n  metadata: [\n",
        "security.istio.io: {enabled: true}\n",
        "apiVersion: cilium.io/v2alpha1\nkind: CiliumLoadBalancerIPPool\nmetadata: {name: p}\nspec: {blocks: []}\n",
        "apiVersion: keda.sh/v1alpha1\nkind: ClusterTriggerAuthentication\nmetadata: {name: p}\n",
        "apiVersion: projectcalico.org/v3\nkind: NetworkPolicy\nmetadata: {name: p}\n",
        "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: p}\nspec: {}\n",
        "{\"apiVersion\": \"gateway.networking.k8s.io/v1\", \"kind\": \"HTTPRoute\", \"spec\": {]}\n",
        "apiVersion: v1\nkind: List\nmetadata: {}\nsize: 1\nitems: []\n",
    ] {
        let mut store = store();
        store.apply("p.yaml", text);
        assert_eq!(verdicts(&store), [A, A, A], "{text}");
    }
}

/// What kubectl prints, and applies again.
#[test]
fn the_items_of_a_list_are_objects() {
    let item = DENY.trim_end().replace('\n', "\n  ");
    let bare = "metadata: {name: d, namespace: prod}\n  spec: {action: DENY, rules: [{}]}";
    let list = |version: &str, kind: &str, item: &str| {
        format!(
            "apiVersion: {version}\nkind: {kind}\nmetadata: {{resourceVersion: \"\"}}\nitems:\n- {item}\n"
        )
    };
    let mut store = store();
    for text in [
        list("v1", "List", &item),
        list("security.istio.io/v1", "AuthorizationPolicyList", &item),
        list("security.istio.io/v1", "AuthorizationPolicyList", bare),
        list("v1", "List", &list("v1", "List", &item).trim_end().replace('\n', "\n  ")),
        "---\n".to_owned() + DENY,
    ] {
        let problems = store.apply("p.yaml", &text);
        assert_eq!(problems, [], "{text}");
        assert_eq!(verdicts(&store), [A, A, D], "{text}");
        assert_eq!(store.objects().filter(|o| &*o.meta.object.kind == "AuthorizationPolicy").count(), 1);
    }
    // Each item is whole or keeps its former version.
    let two = list(
        "v1",
        "List",
        &format!("{}\n- {item}", item.replace("name: d", "name: e").replace("rules", "rulez")),
    );
    let problems: Vec<_> = store.apply("p.yaml", &two).iter().map(|p| p.to_string()).collect();
    let expected =
        "p.yaml:8: error: document 1, AuthorizationPolicy prod/e, items[0].spec.rulez: no such field";
    assert_eq!(problems.last().unwrap(), expected);
    assert_eq!(verdicts(&store), [A, A, D]);
    store.apply("p.yaml", &list("v1", "List", "{}").replace("- {}", "  []"));
    assert_eq!(verdicts(&store), [A, A, A]);
    let problems: Vec<_> = store
        .apply("p.yaml", "apiVersion: v1\nkind: List\nitems: [x]\n")
        .iter()
        .map(|p| p.to_string())
        .collect();
    assert_eq!(
        problems,
        ["p.yaml:3: error: document 1, items[0]: not an object: a document needs apiVersion and kind"]
    );
}

#[test]
fn every_document_of_a_file_that_is_too_large_is_looked_at() {
    let filler = format!("# {}\n---\n", "x".repeat(8 << 20));
    let account = "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: x}\n---\n";
    let mut store = store();
    store.apply("p.yaml", &format!("{account}{DENY}---\n{filler}"));
    assert_eq!(verdicts(&store), [A, A, D]);
    // What was whole before stays.
    store.apply("p.yaml", &(policy("web", "{selector: {matchLabels: {app: web}}}") + "---\n" + DENY));
    assert_eq!(verdicts(&store), [D, A, D]);
    store.apply("p.yaml", &format!("{filler}{DENY}"));
    assert_eq!(verdicts(&store), [D, A, D]);
}

/// Who is in a namespace of these labels cannot be told where the labels cannot be read.
#[test]
fn workloads_of_a_namespace_that_cannot_be_read_are_refused_where_its_labels_matter() {
    let namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: prod, labels: {env: prod}}\n";
    let bad = namespace.replace("name: prod", "name: prod, zone: x");
    let admin = |subject: &str, peer: &str| {
        format!(
            "apiVersion: policy.networking.k8s.io/v1alpha1\nkind: AdminNetworkPolicy\nmetadata: {{name: a}}\nspec:\n  priority: 1\n  \
             subject: {{namespaces: {{matchLabels: {{{subject}}}}}}}\n  ingress: [{{action: Deny, from: [{{namespaces: \
             {{matchLabels: {{{peer}}}}}}}]}}]\n"
        )
    };
    let prod = "kubernetes.io/metadata.name: prod";
    let default = "kubernetes.io/metadata.name: default";
    for (text, policy, expected) in [
        (bad.as_str(), admin("env: prod", default), [A, A, D]),
        (&bad, admin(default, "env: prod"), [A, A, D]),
        (&bad, admin(default, prod), [A, A, A]),
        (&bad, String::new(), [A, A, A]),
        (&namespace.replace("}}", "}"), admin("env: prod", default), [A, A, D]),
        (&namespace.replace("apiVersion", "apiversion"), admin("env: prod", default), [A, A, D]),
        (&namespace.replace("name: prod", "nam: prod"), admin("env: prod", default), [D, D, D]),
        (namespace, admin("env: prod", default), [A, A, A]),
    ] {
        let mut store = store();
        store.apply("namespace.yaml", text);
        store.apply("policy.yaml", &policy);
        assert_eq!(verdicts(&store), expected, "{text}{policy}");
        let refused = expected[2] == D;
        let said = |store: &ObjectStore| {
            let problems = store.check(Settings::default());
            problems
                .iter()
                .any(|p| p.to_string().contains("AdminNetworkPolicy a asks for labels of namespaces"))
        };
        assert_eq!(said(&store), refused, "{text}{policy}");
        // A version that can be read ends it, and stays when the next one is bad.
        for text in [namespace, text] {
            store.apply("namespace.yaml", text);
            assert_eq!(verdicts(&store), [A, A, A], "{text}{policy}");
        }
    }
}
