//! Each object is whole, or keeps its former version, or refuses what it would have selected.

mod mesh;

use mesh::{pod, policy, store, verdict, verdicts};
use weft_policy::Settings;
use weft_policy::Verdict::{Allow as A, Deny as D};

#[test]
fn a_broken_object_keeps_its_former_version_and_others_go_on() {
    let mut store = store();
    let allow = |port| {
        format!(
            "{{selector: {{matchLabels: {{app: web}}}}, rules: [{{to: [{{operation: {{ports: [\"{port}\"]}}}}]}}]}}"
        )
    };
    store.apply(
        "p.yaml",
        &(policy("one", &allow("80")) + &policy("two", "{selector: {matchLabels: {app: db}}}")),
    );
    assert_eq!(verdicts(&store), [A, D, A]);
    // `one` breaks in one commit with the revocation of `two`: the revocation is not held up.
    let problems = store.apply("p.yaml", &policy("one", "{rulez: []}"));
    assert!(problems.iter().any(|p| p.message.contains("stays in its former version")), "{problems:?}");
    assert_eq!(verdicts(&store), [A, A, A]);
    // Broken again, in syntax this time: still the former version.
    store.apply("p.yaml", &policy("one", "{selector: {matchLabels: {app: web}}, rules: [{to: [}]"));
    assert_eq!(verdicts(&store), [A, A, A]);
    let model = store.model(Settings::default());
    assert_eq!(verdict(&model, "default", "web", 81), D);
    // Repaired.
    store.apply("p.yaml", &policy("one", &allow("81")));
    assert_eq!(verdicts(&store), [D, A, A]);
    store.apply("p.yaml", "");
    assert_eq!(verdicts(&store), [A, A, A]);
}

/// An administrator's policy with a field that does not exist.
fn admin(subject: &str) -> String {
    format!(
        "apiVersion: policy.networking.k8s.io/v1alpha1\nkind: AdminNetworkPolicy\nmetadata: {{name: a}}\nspec: {{priority: 1, \
         ingres: [], subject: {{{subject}}}}}\n"
    )
}

#[test]
fn a_policy_that_was_never_whole_refuses_what_it_would_select() {
    for (text, expected) in [
        (policy("p", "{selector: {matchLabels: {app: web}}, rules: nonsense}"), [D, A, A]),
        (policy("p", "{selector: {matchLabel: {app: web}}}"), [D, D, A]),
        (policy("p", "{rules: [}"), [D, D, A]),
        (policy("p, namespace: prod", "{rules: [}"), [A, A, D]),
        (policy("p, namespace: prod", "{rulez: []}"), [A, A, D]),
        (policy("p, namespace: istio-system", "{rulez: []}"), [D, D, D]),
        (policy("p, namespace: istio-system", "{rules: [}"), [D, D, D]),
        (policy("p", "{}").replace("name: p", "nam: p"), [D, D, A]),
        (policy("p", "{}").replace("kind: AuthorizationPolicy\n", ""), [D, D, A]),
        (policy("p", "{rules: [}").replace("kind: AuthorizationPolicy\n", ""), [D, D, A]),
        (policy("p", "{rules: [}").replace("metadata: {name: p}", "metadata:\n  namespace: \"prod\" # here\n  name: p"), [A, A, D]),
        ("apiVersion: cilium.io/v2\nkind: CiliumClusterwideNetworkPolicy\nmetadata: {name: c}\nspec: {}\n".into(), [D, D, D]),
        ("apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: c}\nspec: {ingres: [], endpointSelector: {matchLabels: {\"k8s:app\": web}}}\n".into(), [D, A, A]),
        ("apiVersion: cilium.io/v2\nkind: CiliumClusterwideNetworkPolicy\nmetadata: {name: c}\nspec: {nodeSelector: {}}\n".into(), [A, A, A]),
        ("apiVersion: cilium.io/v2\nkind: CiliumClusterwideNetworkPolicy\nmetadata: {name: c}\nspec: {ingres: [], endpointSelector: {matchLabels: {io.kubernetes.pod.namespace: prod}}}\n".into(), [A, A, D]),
        (admin("namespaces: {matchLabels: {kubernetes.io/metadata.name: prod}}"), [A, A, D]),
        (admin("pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: web}}}"), [D, A, A]),
        (admin("namespaces: {matchLabels: {team: a}}"), [D, D, D]),
        ("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: n, namespace: istio-system}\nspec: {ingres: []}\n".into(), [A, A, A]),
        ("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: n, namespace: prod}\nspec: {ingres: []}\n".into(), [A, A, D]),
        (admin("namespaces: {}, pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: web}}}"), [D, D, D]),
    ] {
        let mut store = store();
        store.apply("p.yaml", &text);
        assert_eq!(verdicts(&store), expected, "{text}");
        store.remove("p.yaml");
        assert_eq!(verdicts(&store), [A, A, A], "{text}");
    }
}

#[test]
fn a_document_that_cannot_be_told_apart_keeps_what_it_may_have_been() {
    let mut store = store();
    store.apply("p.yaml", &policy("web", "{selector: {matchLabels: {app: web}}}"));
    assert_eq!(verdicts(&store), [D, A, A]);
    store.apply("p.yaml", "selector: {matchLabels: {app: web}}\n");
    assert_eq!(verdicts(&store), [D, A, A]);
    // The same on a file that never held an object refuses nobody.
    store.remove("p.yaml");
    store.apply("p.yaml", "selector: {matchLabels: {app: web}}\n");
    assert_eq!(verdicts(&store), [A, A, A]);
}

#[test]
fn a_version_in_another_file_counts_as_the_former_one() {
    let mut store = store();
    store.apply("a.yaml", &policy("p", "{rules: [{}]}"));
    store.apply("b.yaml", &policy("p", "{rulez: []}"));
    assert_eq!(verdicts(&store), [A, A, A]);
    store.remove("a.yaml");
    assert_eq!(verdicts(&store), [D, D, A]);
}

#[test]
fn contested_and_unreadable_addresses_belong_to_nobody() {
    let mut store = store();
    store.apply("more.yaml", &pod("prod", "thief", "10.0.0.1"));
    store.apply("broken.yaml", &pod("prod", "broken", "10.0.7.7").replace("status", "spek: 1\nstatus"));
    let model = store.model(Settings::default());
    for addr in ["10.0.0.1", "10.0.7.7"] {
        let addr = addr.parse().unwrap();
        assert!(model.workload_at(addr).is_none());
        assert!(model.refused_addresses().contains(&addr));
    }
    assert!(model.workload("default", "web").unwrap().addresses.is_empty());
    let numbers = model.identities().into_iter().zip(16..).collect();
    let tables = weft_policy::compile(&model, &numbers);
    let key = weft_policy::model::cidr::addr("10.0.0.1".parse().unwrap());
    use weft_datapath::tables::Tables;
    assert!(tables.endpoint(&key).is_none() && tables.inside(&key));
}

#[test]
fn every_line_break_counts() {
    for breaks in ["\r", "\r\n"] {
        let mut store = store();
        let text = policy("deny", "{action: DENY, rules: [{}]}")
            + "---\napiVersion: v1\nkind: ServiceAccount\nmetadata: {name: a}\n";
        store.apply("p.yaml", &text.replace('\n', breaks));
        assert_eq!(verdicts(&store), [D, D, A], "{breaks:?}");
        assert_eq!(store.problems().count(), 0);
    }
}

/// A wrong API group does not make a policy something to ignore.
#[test]
fn a_policy_in_a_wrong_group_refuses_what_it_would_select() {
    for group in ["policy/v1", "apps/v1", "security.istio.io", "security.istio.org/v1"] {
        let mut store = store();
        let text = policy("deny", "{action: DENY, rules: [{}]}").replace("security.istio.io/v1", group);
        assert_eq!(store.apply("p.yaml", &text).len(), 1, "{group}");
        assert_eq!(verdicts(&store), [D, D, A], "{group}");
    }
}
