//! Every kind of bad input is one clear sentence with file, line, document, object and field.

use weft_policy::{ObjectStore, Settings, Severity};

/// All problems of one file but notes, as the user reads them.
fn check(text: &str) -> Vec<String> {
    let mut store = ObjectStore::new();
    store.apply("f.yaml", text);
    let problems = store.check(Settings::default());
    problems.iter().filter(|p| p.severity != Severity::Note).map(|p| p.to_string()).collect()
}

#[track_caller]
fn says(text: &str, expected: &[&str]) {
    assert_eq!(check(text), expected);
}

const POD: &str = "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nstatus: {podIP: 10.0.0.1}\n";

#[test]
fn unparsable_yaml_costs_one_document() {
    let text = format!("{POD}---\na: [1\n---\n{}", POD.replace("name: p", "name: q"));
    let problems = check(&text);
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert!(problems[0].starts_with("f.yaml:7: error: document 2: not YAML: "), "{problems:?}");
    assert!(problems[1].contains("Pod default/q, status.podIP: 10.0.0.1 is also"), "{problems:?}");
}

#[test]
fn missing_version_kind_or_name() {
    let sentence = "f.yaml:1: error: document 1: not an object: a document needs apiVersion and kind";
    says("kind: Pod\nmetadata: {name: p}\n", &[sentence]);
    says("apiVersion: v1\n", &[sentence]);
    says("just a text", &[sentence]);
    says(
        "apiVersion: v1\nkind: Pod\nmetadata: {}\n",
        &["f.yaml:1: error: document 1, metadata.name: the object has no name"],
    );
}

#[test]
fn unknown_kinds_versions_and_fields() {
    says(
        "apiVersion: v1\nkind: Pot\nmetadata: {name: p}\n",
        &["f.yaml:1: error: document 1, Pot default/p, kind: no kind \"Pot\" is known in apiVersion \"v1\""],
    );
    says(
        "apiVersion: security.istio.io/v9\nkind: PeerAuthentication\nmetadata: {name: p, namespace: n}\n",
        &[
            "f.yaml:1: error: document 1, PeerAuthentication n/p: all workloads of namespace n refuse all traffic \
             until this policy can be enforced",
            "f.yaml:1: error: document 1, PeerAuthentication n/p, kind: PeerAuthentication of version \"v9\" is not \
             known; use v1 or v1beta1",
        ],
    );
    says(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec:\n  hostnetwork: true\nstatus: {podIP: 10.0.0.1}\n",
        &[
            "f.yaml:1: warning: document 1, Pod default/p: connections to 10.0.0.1 are refused until it can be read",
            "f.yaml:5: error: document 1, Pod default/p, spec.hostnetwork: no such field; is \"hostNetwork\" meant?",
        ],
    );
}

#[test]
fn a_field_is_named_by_its_whole_path() {
    let text = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: a, namespace: n}
spec:
  selector: {matchLabels: {app: x}}
  rules:
  - from:
    - source: {ipBlocks: [10.0.0.0/8, 10.0.0.0/40]}
    - source: {}
    to:
    - operation: {ports: [\"0\", http], pots: []}
    when:
    - {key: source.port, values: [x]}
    - {key: experimental.envoy.filters.x, values: [x]}
    - {values: [x]}
    - {key: source.ip}
";
    let name = "document 1, AuthorizationPolicy n/a";
    let rule = format!("{name}, spec.rules[0]");
    says(
        text,
        &[
            &format!(
                "f.yaml:2: error: {name}: the selected workloads of namespace n refuse all traffic until this policy \
                 can be enforced"
            ),
            &format!(
                "f.yaml:9: error: {rule}.from[0].source.ipBlocks[1]: \"10.0.0.0/40\" is no address range; write it as \
                 10.1.0.0/16, 2001:db8::/32 or a single address"
            ),
            &format!(
                "f.yaml:10: error: {rule}.from[1].source: an empty `source` is ambiguous; name what it must match, or \
                 leave it out"
            ),
            &format!(
                "f.yaml:12: error: {rule}.to[0].operation.ports[0]: expected a number from 1 to 65535, found \"0\""
            ),
            &format!(
                "f.yaml:12: error: {rule}.to[0].operation.ports[1]: expected a number from 1 to 65535, found \"http\""
            ),
            &format!("f.yaml:12: error: {rule}.to[0].operation.pots: no such field"),
            &format!("f.yaml:14: error: {rule}.when[0].key: no condition is called \"source.port\""),
            &format!(
                "f.yaml:15: error: {rule}.when[1].key: condition \"experimental.envoy.filters.x\" is not enforceable yet"
            ),
            &format!("f.yaml:16: error: {rule}.when[2]: `key` is missing"),
            &format!("f.yaml:17: error: {rule}.when[3]: `values` or `notValues` is missing"),
        ],
    );
}

#[test]
fn addresses() {
    let text = format!("{POD}---\n{}", POD.replace("name: p", "name: q"));
    says(
        &text,
        &[
            "f.yaml:6: error: document 2, Pod default/q, status.podIP: 10.0.0.1 is also the address of Pod default/p; \
           the address is refused until one gives it up",
        ],
    );
    says(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\n",
        &[
            "f.yaml:1: warning: document 1, Pod default/p, status.podIP: the pod has no address, so nothing can reach it \
           through the mesh; set status.podIP",
        ],
    );
    says(
        &POD.replace("10.0.0.1", "10.0.0.256"),
        &[
            "f.yaml:4: error: document 1, Pod default/p, status.podIP: \"10.0.0.256\" is no address of a workload; write \
           one IPv4 or IPv6 address",
        ],
    );
}

#[test]
fn a_netns_annotation_is_an_absolute_path() {
    for path in ["netns/x", "/run/../etc", "/", ""] {
        let text = POD.replace("name: p", &format!("name: p, annotations: {{weft.dev/netns: \"{path}\"}}"));
        let problems = check(&text);
        assert!(
            problems
                .iter()
                .any(|p| p.contains("metadata.annotations[weft.dev/netns]") && p.contains("is no path")),
            "{path}: {problems:?}"
        );
    }
}

#[test]
fn a_duplicate_says_where_the_first_is() {
    let problems = check(&format!("{POD}---\n{POD}"));
    assert_eq!(
        problems,
        [
            "f.yaml:6: error: document 2, Pod default/p, metadata.name: given before, in f.yaml line 1 (document 1), \
          which counts; remove one"
        ]
    );
}

#[test]
fn probes_and_ports() {
    let probe = |port: &str| {
        check(&POD.replace(
            "status",
            &format!(
                "spec: {{containers: [{{ports: [{{name: http, containerPort: 80}}], livenessProbe: {{httpGet: \
                 {{path: /x, port: {port}}}}}}}]}}\nstatus"
            ),
        ))
    };
    assert_eq!(probe("http"), [] as [String; 0]);
    assert_eq!(probe("8080"), [] as [String; 0]);
    assert!(
        probe("metrics")[1]
            .contains("spec.containers[0].livenessProbe.httpGet.port: neither a port nor the name")
    );
}

#[test]
fn unenforceable_actions_are_named() {
    for (spec, expected) in [
        ("{action: CUSTOM, provider: {name: x}}", "external authorization is not enforceable yet"),
        ("{action: CUSTOM}", "action CUSTOM asks an external authorizer"),
        ("{action: allow}", "no action \"allow\""),
        (
            "{targetRefs: [{kind: Gateway, group: gateway.networking.k8s.io, name: x}]}",
            "weft has no \"Gateway\"",
        ),
        ("{targetRefs: [{kind: Service}]}", "`name` is missing"),
        ("{targetRefs: [{kind: Service, name: x, namespace: y}]}", "services of its own namespace only"),
        ("{targetRef: {kind: Service, name: x}, selector: {matchLabels: {a: b}}}", "there is a selector too"),
        ("{rules: [{from: []}]}", "an empty `from` is ambiguous"),
        ("{rules: [{to: [{}]}]}", "`operation` is missing"),
        ("{rules: [{to: [{operation: {ports: []}}]}]}", "an empty list is ambiguous"),
        ("{rules: [{from: [{source: {serviceAccounts: [\"a*\"]}}]}]}", "without wildcards"),
        ("{rules: [{from: [{source: {serviceAccounts: [a], namespaces: [b]}}]}]}", "cannot be combined"),
    ] {
        let text = format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: a}}\nspec: {spec}\n"
        );
        let problems = check(&text);
        assert!(problems.iter().any(|p| p.contains(expected)), "{spec}: {problems:?}");
        assert!(problems.iter().any(|p| p.contains("refuse all traffic")), "{spec}: {problems:?}");
    }
}

#[test]
fn a_policy_on_no_service_selects_nobody_and_a_dry_run_is_true_or_false() {
    let policy = |meta: &str, spec: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: a{meta}}}\nspec: {spec}\n"
        )
    };
    says(
        &policy("", "{targetRefs: [{kind: Service, name: x}], rules: [{}]}"),
        &[
            "f.yaml:1: warning: document 1, AuthorizationPolicy default/a, spec.targetRefs[0]: there is no Service default/x: \
           nothing is selected by it",
        ],
    );
    says(
        &policy(", annotations: {istio.io/dry-run: maybe}", "{rules: [{}]}"),
        &[
            "f.yaml:1: warning: document 1, AuthorizationPolicy default/a, metadata.annotations: istio.io/dry-run is \
           \"maybe\", neither true nor false: the policy is enforced",
        ],
    );
}

#[test]
fn token_rules_that_cannot_be_enforced_are_named() {
    const RSA: &str = r#"{"keys": [{"kty": "RSA", "n": "bm4", "e": "AQAB", "use": "sig", "kid": "1"}]}"#;
    let jwks = |keys: &str| format!("issuer: i, jwks: '{keys}'");
    for (rule, expected) in [
        ("jwksUri: \"https://issuer.example/keys\"".into(), "`issuer` is missing"),
        ("issuer: i, jwksUri: \"https://issuer.example/keys\"".into(), "jwksUri: key sets are not fetched"),
        ("issuer: i, jwksUri: \"file://keys\"".into(), "jwksUri: key sets are not fetched"),
        ("issuer: i".into(), "jwtRules[0]: `jwks` is missing"),
        (jwks(RSA) + ", jwksUri: \"file:///keys\"", "there is `jwks` too"),
        (jwks("{"), "jwks: no key set in JSON"),
        (jwks(r#"{"keys": []}"#), "jwks: no usable key is in the set"),
        (
            jwks(r#"{"keys": [{"kty": "oct", "k": "c2VjcmV0"}]}"#),
            "jwks.keys[0]: this is a private or shared key",
        ),
        (jwks(RSA) + ", fromHeaders: [{prefix: x}]", "fromHeaders[0]: `name` is missing"),
        (jwks(RSA) + ", fromParams: [\"\"]", "fromParams[0]: an empty text"),
        (jwks(RSA) + ", audience: [x]", "audience: no such field"),
        (
            jwks(RSA) + ", outputClaimToHeaders: [{header: Authorization, claim: sub}]",
            "a claim cannot take the place of the token",
        ),
        (jwks(RSA) + ", outputClaimToHeaders: [{claim: sub}]", "`header` and `claim` are both needed"),
    ] {
        let text = format!(
            "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: a}}\nspec: {{jwtRules: \
             [{{{rule}}}]}}\n"
        );
        let problems = check(&text);
        assert!(problems.iter().any(|p| p.contains(expected)), "{rule}: {problems:?}");
        assert!(problems.iter().any(|p| p.contains("refuse all traffic")), "{rule}: {problems:?}");
    }
    for key in [
        r#"{"kty": "EC", "crv": "P-192", "x": "eA", "y": "eQ"}"#,
        r#"{"kty": "RSA", "n": "bm4"}"#,
        r#"{"kty": "RSA", "n": "!!", "e": "AQAB"}"#,
        r#"{"kty": "RSA", "n": "bm4", "e": "AQAB", "use": "enc"}"#,
        r#"{"kty": "EC", "crv": "P-256", "x": "eA", "y": "eQ", "alg": "HS256"}"#,
    ] {
        let among = |keys: &str| {
            check(&format!(
                "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: a}}\nspec: {{jwtRules: \
                 [{{{}}}]}}\n",
                jwks(keys)
            ))
        };
        let alone = among(&format!("{{\"keys\": [{key}]}}"));
        assert!(alone.iter().any(|p| p.contains("no usable key is in the set")), "{key}: {alone:?}");
        let beside = among(&RSA.replace("[{", &format!("[{key}, {{")));
        assert!(beside.iter().any(|p| p.contains("jwks.keys[0]: left out")), "{key}: {beside:?}");
        assert!(!beside.iter().any(|p| p.contains("error")), "{key}: {beside:?}");
    }
    let whole = jwks(RSA)
        + ", audiences: [a], fromHeaders: [{name: X-Token, prefix: \"t \"}], fromParams: [p], fromCookies: [c], \
           outputPayloadToHeader: x-payload, outputClaimToHeaders: [{header: x-sub, claim: sub}], forwardOriginalToken: \
           true, timeout: 5s";
    let text = format!(
        "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: a}}\nspec: {{jwtRules: [{{{whole}}}]}}\n"
    );
    let problems = check(&text);
    assert!(!problems.iter().any(|p| p.contains("error")), "{problems:?}");
}

#[test]
fn services_that_claim_one_address_and_policies_that_tear_an_identity() {
    let service = |name: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: 10.96.0.1, ports: [{{port: \
             80}}]}}\n---\n"
        )
    };
    says(
        &(service("a") + &service("b")),
        &[
            "f.yaml:6: warning: document 2, Service default/b, spec.clusterIP: 10.96.0.1 port 80 already belongs to \
           Service default/a, which counts",
        ],
    );
    // The same range twice in one rule is one warning.
    let pods = format!("{POD}---\n{}", POD.replace("name: p", "name: q").replace("0.1", "0.2"));
    let policy = "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: a}\nspec: {rules: \
                  [{when: [{key: destination.ip, values: [10.0.0.1], notValues: [10.0.0.1]}]}]}\n";
    says(
        &(pods + policy),
        &[
            "f.yaml:11: warning: document 3, AuthorizationPolicy default/a, spec.rules: destination.ip 10.0.0.1/32 holds \
           for some addresses of spiffe://cluster.local/ns/default/sa/default and not for others; where that decides, \
           flows are refused: give these pods different labels or service accounts",
        ],
    );
}

#[test]
fn the_younger_of_two_modes_of_the_same_workloads_is_told() {
    let policy = |name: &str, spec: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: {name}}}\nspec: {spec}\n---\n"
        )
    };
    says(
        &(policy("a", "{mtls: {mode: PERMISSIVE}}")
            + &policy("b", "{mtls: {mode: STRICT}}")
            + &policy("c", "{selector: {matchLabels: {app: x}}, mtls: {mode: STRICT}}")),
        &[
            "f.yaml:6: warning: document 2, PeerAuthentication default/b, spec: never counts: PeerAuthentication default/a selects \
           the same and goes first, by age and then by name",
        ],
    );
}
