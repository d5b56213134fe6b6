//! What `weft policy check` says of manifests that are right and hardly meant.

use weft_policy::lint::lint;
use weft_policy::{ObjectStore, Settings};

const POD: &str = "apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}}
status: {podIP: 10.0.0.2}
---
";

#[track_caller]
fn says(text: &str, wanted: &[&str]) {
    let mut store = ObjectStore::new();
    assert_eq!(store.apply("f.yaml", &format!("{POD}{text}")), []);
    let found = lint(&store, &store.model(Settings::default()));
    assert_eq!(found.iter().map(ToString::to_string).collect::<Vec<_>>(), wanted);
}

#[test]
fn a_selector_that_matches_nobody() {
    let policy = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec: {selector: {matchLabels: {app: db}}, rules: [{}]}
";
    says(policy, &[]);
    let wrong = "f.yaml:6: warning: document 2, AuthorizationPolicy shop/p, spec.selector: selects no workload of these \
                 manifests; compare its labels and namespace";
    says(&policy.replace("app: db", "app: bd"), &[wrong]);
    let network = "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: p, namespace: shop}
spec: {podSelector: {matchLabels: {app: db}}, policyTypes: [Ingress]}
";
    says(network, &[]);
    let wrong = "f.yaml:6: warning: document 2, NetworkPolicy shop/p, spec: selects no workload of these manifests; \
                 compare its labels and namespace";
    says(&network.replace("namespace: shop", "namespace: shp"), &[&wrong.replace("shop/p", "shp/p")]);
}

#[test]
fn rules_that_change_nothing() {
    let policy = "apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec:
  rules:
  - to: [{operation: {ports: ['1']}}]
  - to: [{operation: {ports: ['2']}}]
  - to: [{operation: {ports: ['1']}}]
";
    let place = "document 2, AuthorizationPolicy shop/p, spec.rules";
    says(policy, &[&format!("f.yaml:13: warning: {place}[2]: is the same as rules[0]; remove one of them")]);
    let shadowed = |line, index| {
        format!(
            "f.yaml:{line}: warning: {place}[{index}]: is shadowed by rules[1], which matches all that it does; remove \
             one of them"
        )
    };
    let text = policy
        .replace("- to: [{operation: {ports: ['2']}}]", "- {}")
        .replace("  - to: [{operation: {ports: ['1']}}]\n", "");
    says(&text, &[]);
    let text = policy.replace("- to: [{operation: {ports: ['2']}}]", "- {}").replacen("['1']", "['3']", 1);
    says(&text, &[&shadowed(11, 0), &shadowed(13, 2)]);
}

#[test]
fn a_service_without_endpoints() {
    let service = "apiVersion: v1
kind: Service
metadata: {name: s, namespace: shop}
spec: {clusterIP: 10.9.0.1, selector: {app: db}, ports: [{port: 80}]}
";
    says(service, &[]);
    let wrong = "f.yaml:6: warning: document 2, Service shop/s, spec.selector: port 80 has no endpoints: no ready pod has \
                 these labels and this port; connections to it fail";
    says(&service.replace("app: db", "app: web"), &[wrong]);
}

fn authorization(name: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: shop}}\n\
         spec: {{{spec}}}\n---\n"
    )
}

fn network(kind: &str, name: &str, spec: &str) -> String {
    let (version, namespace) = match kind {
        "NetworkPolicy" => ("networking.k8s.io/v1", ", namespace: shop"),
        "CiliumNetworkPolicy" => ("cilium.io/v2", ", namespace: shop"),
        _ => ("policy.networking.k8s.io/v1alpha1", ""),
    };
    format!(
        "apiVersion: {version}\nkind: {kind}\nmetadata: {{name: {name}{namespace}}}\nspec: {{{spec}}}\n---\n"
    )
}

/// What lint says of a text, without places.
fn told(text: &str) -> Vec<String> {
    let mut store = ObjectStore::new();
    assert_eq!(store.apply("f.yaml", &format!("{POD}{text}")), []);
    let found = lint(&store, &store.model(Settings::default()));
    let object = |p: &weft_policy::Problem| p.object.as_ref().map(ToString::to_string).unwrap_or_default();
    found.iter().map(|p| format!("{}, {}: {}", object(p), p.field, p.message)).collect()
}

#[test]
fn rules_of_other_policies_shadow_too() {
    let a = authorization("a", "rules: [{to: [{operation: {ports: ['80']}}]}]");
    let same = "AuthorizationPolicy shop/b, spec.rules[0]: is the same as AuthorizationPolicy shop/a rules[0]; remove one of them";
    assert_eq!(
        told(&(a.clone() + &authorization("b", "rules: [{to: [{operation: {ports: ['80']}}]}]"))),
        [same]
    );
    assert_eq!(
        told(&(a.clone() + &authorization("b", "rules: [{to: [{operation: {ports: ['81']}}]}]"))),
        [""; 0]
    );
    // Fewer groups match more.
    let narrow = authorization(
        "b",
        "selector: {matchLabels: {app: db}}, rules: [{from: [{source: {namespaces: [x]}}], to: [{operation: {ports: ['80']}}]}]",
    );
    let wide = "AuthorizationPolicy shop/b, spec.rules[0]: is shadowed by AuthorizationPolicy shop/a rules[0], which matches all \
                that it does; remove one of them";
    assert_eq!(told(&(a.clone() + &narrow)), [wide]);
    // Another workload keeps the wider selector from being covered.
    let web = POD.replace("name: db", "name: web").replace("app: db", "app: web").replace("0.2", "0.3");
    let all = authorization("c", "rules: [{to: [{operation: {ports: ['80']}}]}]");
    let only = authorization(
        "a",
        "selector: {matchLabels: {app: db}}, rules: [{to: [{operation: {ports: ['80']}}]}]",
    );
    let shadowed = "AuthorizationPolicy shop/a, spec.rules[0]: is shadowed by AuthorizationPolicy shop/c rules[0], which matches \
                    all that it does; remove one of them";
    assert_eq!(told(&(web + &only + &all)), [shadowed]);
    // A dry run decides nothing.
    let dry = a.replace("namespace: shop}", "namespace: shop, annotations: {istio.io/dry-run: 'true'}}");
    assert_eq!(told(&(dry + &narrow)), [""; 0]);
}

#[test]
fn what_is_denied_first_is_never_reached() {
    let deny = authorization("deny", "action: DENY, rules: [{from: [{source: {namespaces: [x]}}]}]");
    let rule = "from: [{source: {namespaces: [x]}}], to: [{operation: {ports: ['80']}}]";
    let allow = authorization("allow", &format!("rules: [{{{rule}}}, {{}}]"));
    let never = "AuthorizationPolicy shop/allow, spec.rules[0]: is never reached: AuthorizationPolicy shop/deny rules[0] is asked \
                 first, and matches all that it does";
    assert_eq!(told(&(deny.clone() + &allow)), [never]);
    let other = allow.replace("namespaces: [x]", "namespaces: [y]").replace(", {}", "");
    assert_eq!(told(&(deny + &other)), [""; 0]);

    let cilium = |deny: &str| {
        let spec = format!(
            "endpointSelector: {{}}, ingress: [{{fromEndpoints: [{{}}], toPorts: [{{ports: [{{port: \"80\", protocol: TCP}}]}}]}}], \
             ingressDeny: [{deny}]"
        );
        told(&network("CiliumNetworkPolicy", "c", &spec))
    };
    let never = "CiliumNetworkPolicy shop/c, spec.ingress[0]: is never reached: ingressDeny[0] is asked first, and matches all that \
                 it does";
    assert_eq!(cilium("{fromEntities: [all]}"), [never]);
    assert_eq!(cilium("{fromEntities: [world]}"), [""; 0]);
}

#[test]
fn ordered_rules_behind_a_wider_one_are_never_reached() {
    let all = "from: [{namespaces: {}}]";
    let one = "from: [{namespaces: {matchLabels: {team: x}}}]";
    let admin = |first: &str, second: &str, ports: &str| {
        let rules = format!("[{{action: Deny, {first}{ports}}}, {{action: Allow, {second}}}]");
        told(&network(
            "AdminNetworkPolicy",
            "n",
            &format!("priority: 1, subject: {{namespaces: {{}}}}, ingress: {rules}"),
        ))
    };
    let never = "AdminNetworkPolicy n, spec.ingress[1]: is never reached: ingress[0] is asked first, and matches all that it does";
    assert_eq!(admin(all, one, ""), [never]);
    assert_eq!(admin(one, all, ""), [""; 0]);
    assert_eq!(admin(all, one, ", ports: [{portNumber: {protocol: TCP, port: 80}}]"), [""; 0]);

    let baseline = network(
        "BaselineAdminNetworkPolicy",
        "default",
        &format!("subject: {{namespaces: {{}}}}, ingress: [{{action: Deny, {all}}}]"),
    );
    assert_eq!(told(&baseline), [""; 0]);
    let isolates = network("NetworkPolicy", "i", "podSelector: {}, policyTypes: [Ingress]");
    assert_eq!(
        told(&(baseline.clone() + &isolates)),
        [
            "BaselineAdminNetworkPolicy default, spec.ingress: is never reached: a NetworkPolicy isolates every workload that it selects"
        ]
    );
    let other = network("NetworkPolicy", "i", "podSelector: {}, policyTypes: [Egress]");
    assert_eq!(told(&(baseline + &other)), [""; 0]);

    let ranges = |wide: &str, narrow: &str| {
        let rule = |cidr: &str, port: &str| {
            format!("{{from: [{{ipBlock: {{cidr: {cidr}}}}}], ports: [{{{port}}}]}}")
        };
        let rules = format!("[{}, {}]", rule("10.0.0.0/8", wide), rule("10.1.0.0/16", narrow));
        told(&network("NetworkPolicy", "n", &format!("podSelector: {{}}, ingress: {rules}")))
    };
    let shadowed = "NetworkPolicy shop/n, spec.ingress[1]: is shadowed by ingress[0], which matches all that it does; remove one of \
                    them";
    assert_eq!(ranges("port: 80, endPort: 90", "port: 85"), [shadowed]);
    assert_eq!(ranges("port: 80, endPort: 90", "port: 95"), [""; 0]);
    assert_eq!(ranges("port: 80", "port: 80, protocol: UDP"), [""; 0]);
}

#[test]
fn http_on_a_port_that_is_not_declared_http() {
    let service = |port: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: s, namespace: shop}}\n\
             spec: {{clusterIP: 10.9.0.1, selector: {{app: db}}, ports: [{{{port}, port: 80, targetPort: 8080}}]}}\n---\n"
        )
    };
    let rule = |ports: &str| {
        authorization("p", &format!("rules: [{{to: [{{operation: {{methods: [GET]{ports}}}}}]}}]"))
    };
    let wrong = |who: &str| {
        format!(
            "AuthorizationPolicy shop/p, spec.rules[0]: needs HTTP on port 8080 of Pod shop/db, which {who} as HTTP; name the \
             service's port http, http2 or grpc (with -SUFFIX), or set its appProtocol"
        )
    };
    for declared in [
        "name: http",
        "name: http-api",
        "name: grpc",
        "name: x, appProtocol: http",
        "name: x, appProtocol: kubernetes.io/h2c",
    ] {
        assert_eq!(told(&(service(declared) + &rule(""))), [""; 0], "{declared}");
        assert_eq!(told(&(service(declared) + &rule(", ports: ['8080']"))), [""; 0], "{declared}");
    }
    for other in ["name: tcp-http", "name: https", "name: http, appProtocol: tcp", "name: httpx"] {
        let expected = [wrong("Service shop/s does not declare")];
        assert_eq!(told(&(service(other) + &rule(""))), expected, "{other}");
        assert_eq!(told(&(service(other) + &rule(", ports: ['8080']"))), expected, "{other}");
    }
    assert_eq!(told(&rule(", ports: ['8080']")), [wrong("nothing declares")]);
    // Of a pod without services nothing is known.
    assert_eq!(told(&rule("")), [""; 0]);
    let cilium = network(
        "CiliumNetworkPolicy",
        "c",
        "endpointSelector: {}, ingress: [{toPorts: [{ports: [{port: \"8080\", protocol: TCP}], rules: {http: [{method: GET}]}}]}]",
    );
    let expected = wrong("Service shop/s does not declare")
        .replace("AuthorizationPolicy shop/p, spec.rules", "CiliumNetworkPolicy shop/c, spec.ingress");
    assert_eq!(told(&(service("name: tcp") + &cilium)), [expected]);
    assert_eq!(told(&(service("name: http") + &cilium)), [""; 0]);
}

#[test]
fn a_denial_of_everything_locks_out_health_checks() {
    let locked = "AuthorizationPolicy shop/p, spec: denies everything, health checks of the node too, and Pod shop/db declares no \
                  probe by HTTP, TCP or gRPC; declare it, and its port stays open to the node";
    let nothing = authorization("p", "{}").replace("spec: {{}}", "spec: {}");
    assert_eq!(told(&nothing), [locked]);
    assert_eq!(told(&authorization("p", "action: DENY, rules: [{}]")), [locked]);
    // Some may come in, or the port is declared.
    assert_eq!(told(&authorization("p", "rules: [{from: [{source: {namespaces: [x]}}]}]")), [""; 0]);
    assert_eq!(
        told(&(nothing.clone() + &authorization("q", "rules: [{to: [{operation: {ports: ['80']}}]}]"))),
        [""; 0]
    );
    for probe in ["httpGet: {path: /, port: 80}", "tcpSocket: {port: 80}", "grpc: {port: 80}"] {
        let probed = POD
            .replace("status:", &format!("spec: {{containers: [{{livenessProbe: {{{probe}}}}}]}}\nstatus:"));
        let text = probed
            .replace("name: db", "name: probed")
            .replace("app: db", "app: probed")
            .replace("0.2", "0.3");
        let only = nothing.replace("spec: {}", "spec: {selector: {matchLabels: {app: probed}}}");
        assert_eq!(told(&(text + &only)), [""; 0], "{probe}");
    }
    // Where an identity is asked for anyway, it is not this policy that locks out.
    let strict = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: shop}\n\
                  spec: {mtls: {mode: STRICT}}\n---\n";
    assert_eq!(told(&(nothing + strict)), [""; 0]);
}

#[test]
fn a_token_that_nobody_verifies() {
    let rules = "jwtRules: [{issuer: i, jwksUri: 'file:///keys.json'}]";
    let tokens = |spec: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: RequestAuthentication\nmetadata: {{name: r, namespace: shop}}\n\
             spec: {{{spec}}}\n---\n"
        )
    };
    let asks = |text: &str| told(text).into_iter().filter(|line| line.contains("asks about a JWT")).count();
    for rule in [
        "{from: [{source: {requestPrincipals: ['*']}}]}",
        "{from: [{source: {notRequestPrincipals: ['*']}}]}",
        "{when: [{key: request.auth.principal, values: [a]}]}",
        "{when: [{key: request.auth.audiences, values: [a]}]}",
        "{when: [{key: request.auth.presenter, notValues: [a]}]}",
        "{when: [{key: 'request.auth.claims[a][b]', values: [a]}]}",
    ] {
        let policy = authorization("p", &format!("rules: [{rule}]"));
        assert_eq!(asks(&policy), 1, "{rule}");
        assert_eq!(asks(&(policy.clone() + &tokens(rules))), 0, "{rule}");
        // One without rules verifies none, and one for others none of these.
        assert_eq!(asks(&(policy.clone() + &tokens(""))), 1, "{rule}");
        let others = tokens(&format!("selector: {{matchLabels: {{app: web}}}}, {rules}"));
        assert_eq!(asks(&(policy + &others)), 1, "{rule}");
    }
    for rule in
        ["{to: [{operation: {methods: [GET]}}]}", "{when: [{key: 'request.headers[x]', values: [a]}]}"]
    {
        assert_eq!(asks(&authorization("p", &format!("rules: [{rule}]"))), 0, "{rule}");
    }
    // The rule is named by its place; a policy on two services is told of once.
    let second = authorization("p", "rules: [{}, {from: [{source: {requestPrincipals: ['*']}}]}]");
    let found = told(&second);
    let wanted = "AuthorizationPolicy shop/p, spec.rules[1]: asks about a JWT, and no RequestAuthentication with jwtRules \
                  selects spiffe://cluster.local/ns/shop/sa/default: no request to it ever has one that is verified; add \
                  one with the issuer and its keys";
    assert!(found.iter().any(|line| line == wanted), "{found:?}");
    let service = |name: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{selector: {{app: db}}, \
             ports: [{{port: 80}}]}}\n---\n"
        )
    };
    let attached = authorization(
        "p",
        "targetRefs: [{kind: Service, name: a}, {kind: Service, name: b}], rules: [{from: [{source: {requestPrincipals: \
         ['*']}}]}]",
    );
    assert_eq!(asks(&(service("a") + &service("b") + &attached)), 1);
    assert_eq!(asks(&(service("a") + &service("b") + &attached + &tokens(rules))), 0);
}
