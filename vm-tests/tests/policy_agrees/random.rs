//! Random policies of every language, about the world of `main.rs`. Nearly all can be enforced.

use std::time::{SystemTime, UNIX_EPOCH};

/// A small generator: the same seed gives the same policies (xorshift64*, Vigna 2016).
pub(crate) struct Random(u64);

const CIDRS: &[&str] = &[
    "10.77.1.0/24",
    "10.77.1.10/32",
    "10.77.2.0/24",
    "10.0.0.0/8",
    "0.0.0.0/0",
    "fd77:1::/64",
    "fd77:1::11/128",
    "fd77:2::/64",
    "::/0",
];
const LABELS: &[&str] = &["{}", "{tier: red}", "{tier: blue}", "{app: a}", "{app: b}", "{tier: red, app: c}"];

impl Random {
    /// From `WEFT_SEED`, to try a run again, or from the clock.
    pub(crate) fn new() -> (u64, Random) {
        let given = std::env::var("WEFT_SEED").ok().map(|seed| seed.parse().expect("WEFT_SEED is a number"));
        let clock = || SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_nanos() as u64;
        let seed: u64 = given.unwrap_or_else(clock).max(1);
        (seed, Random(seed))
    }

    /// A number below `limit`.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }

    /// Is it the one case of so many?
    fn one_in(&mut self, cases: usize) -> bool {
        self.below(cases) == 0
    }

    pub(crate) fn pick<'a, T: ?Sized>(&mut self, values: &[&'a T]) -> &'a T {
        values[self.below(values.len())]
    }

    /// `[x, ..]` of one to `most`.
    fn list(&mut self, most: usize, item: impl Fn(&mut Random) -> String) -> String {
        let items: Vec<String> = (0..=self.below(most)).map(|_| item(self)).collect();
        format!("[{}]", items.join(", "))
    }

    /// One to four policies, their names beginning with `name`.
    pub(crate) fn policies(&mut self, name: &str) -> Vec<String> {
        let mut policies = vec![self.mode()];
        for index in 0..=self.below(4) {
            let name = format!("{name}-{index}");
            policies.push(match self.below(9) {
                0..=2 => self.authorization(&name),
                3..=5 => self.network(&name),
                6..=7 => self.cilium(&name),
                _ => self.admin(&name),
            });
        }
        policies
    }

    fn mode(&mut self) -> String {
        let mode = self.pick(&["STRICT", "PERMISSIVE", "PERMISSIVE"]);
        format!(
            "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
             metadata: {{name: default, namespace: istio-system}}\nspec: {{mtls: {{mode: {mode}}}}}\n"
        )
    }

    fn authorization(&mut self, name: &str) -> String {
        let namespace = self.pick(&["default", "prod", "istio-system"]);
        let selector = match self.pick(LABELS) {
            "{}" => String::new(),
            labels => format!("selector: {{matchLabels: {labels}}}, "),
        };
        let action = self.pick(&["ALLOW", "ALLOW", "DENY"]);
        let rules = self.list(2, |random| {
            let source = match random.below(6) {
                0 => "principals: [\"*/sa/a\", \"cluster.local/ns/prod/*\"]".to_owned(),
                1 => "notPrincipals: [\"cluster.local/ns/default/sa/b\"]".to_owned(),
                2 => format!("namespaces: [{}]", random.pick(&["default", "prod", "\"*\""])),
                3 => format!("ipBlocks: [\"{}\"]", random.pick(CIDRS)),
                4 => format!("notIpBlocks: [\"{}\"]", random.pick(CIDRS)),
                _ => String::new(),
            };
            let ports = match random.below(4) {
                0 => "ports: [\"8080\"]",
                1 => "ports: [\"8081\", \"5353\", \"8500\"]",
                2 => "notPorts: [\"8080\"]",
                _ if random.one_in(4) => "methods: [GET]",
                _ => "",
            };
            let mut parts = Vec::new();
            if !source.is_empty() {
                parts.push(format!("from: [{{source: {{{source}}}}}]"));
            }
            if !ports.is_empty() {
                parts.push(format!("to: [{{operation: {{{ports}}}}}]"));
            }
            format!("{{{}}}", parts.join(", "))
        });
        let rules = if self.one_in(8) { "[]".to_owned() } else { rules };
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
             metadata: {{name: {name}, namespace: {namespace}}}\nspec: {{{selector}action: {action}, rules: {rules}}}\n"
        )
    }

    fn labels(&mut self) -> String {
        format!("{{matchLabels: {}}}", self.pick(LABELS))
    }

    fn namespaces(&mut self) -> String {
        let name = self.pick(&["default", "prod"]);
        match self.below(3) {
            0 => "{}".to_owned(),
            _ => format!("{{matchLabels: {{kubernetes.io/metadata.name: {name}}}}}"),
        }
    }

    fn block(&mut self) -> String {
        match self.below(4) {
            0 => "{cidr: 10.77.0.0/16, except: [10.77.1.11/32, 10.77.2.0/24]}".to_owned(),
            1 => "{cidr: \"fd77::/16\", except: [\"fd77:1::a/127\"]}".to_owned(),
            _ => format!("{{cidr: \"{}\"}}", self.pick(CIDRS)),
        }
    }

    fn network(&mut self, name: &str) -> String {
        let namespace = self.pick(&["default", "prod"]);
        let rules = |random: &mut Random, side: &str| {
            random.list(2, |random| {
                let peers = random.list(2, |random| match random.below(4) {
                    0 => format!("{{podSelector: {}}}", random.labels()),
                    1 => format!("{{namespaceSelector: {}}}", random.namespaces()),
                    2 => {
                        format!(
                            "{{namespaceSelector: {}, podSelector: {}}}",
                            random.namespaces(),
                            random.labels()
                        )
                    }
                    _ => format!("{{ipBlock: {}}}", random.block()),
                });
                let ports = random.list(2, |random| {
                    random
                        .pick(&[
                            "{port: 8080}",
                            "{port: web}",
                            "{port: 8400, endPort: 8600}",
                            "{port: 5353, protocol: UDP}",
                            "{protocol: UDP}",
                            "{}",
                        ])
                        .to_owned()
                });
                match random.below(4) {
                    0 => format!("{{{side}: {peers}}}"),
                    1 => format!("{{ports: {ports}}}"),
                    _ => format!("{{{side}: {peers}, ports: {ports}}}"),
                }
            })
        };
        let (ingress, egress) = (rules(self, "from"), rules(self, "to"));
        let sides = match self.below(5) {
            0..=1 => format!("policyTypes: [Ingress], ingress: {ingress}"),
            2 => format!("policyTypes: [Egress], egress: {egress}"),
            3 => format!("policyTypes: [Ingress, Egress], ingress: {ingress}, egress: {egress}"),
            _ => "policyTypes: [Ingress]".to_owned(),
        };
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
             spec: {{podSelector: {}, {sides}}}\n",
            self.labels()
        )
    }

    fn cilium(&mut self, name: &str) -> String {
        let rule = |random: &mut Random, side: &str, deny: bool| {
            let peers = match random.below(5) {
                0 => format!("{side}Endpoints: [{}], ", random.labels()),
                // What a denial would have to name on other nodes is refused.
                1 if deny => format!("{side}Entities: [{}], ", random.pick(&["world", "all"])),
                1 => format!("{side}Entities: [{}], ", random.pick(&["world", "host", "cluster", "all"])),
                2 => format!("{side}CIDR: [\"{}\"], ", random.pick(CIDRS)),
                3 => format!("{side}CIDRSet: [{}], ", random.block()),
                _ => String::new(),
            };
            let ports = match random.below(6) {
                0 => "toPorts: [{ports: [{port: \"8080\", protocol: TCP}]}]",
                1 => "toPorts: [{ports: [{port: \"5353\", protocol: ANY}]}]",
                2 => "toPorts: [{ports: [{port: \"8400\", endPort: 8600, protocol: TCP}]}]",
                3 => "icmps: [{fields: [{type: 8, family: IPv4}, {type: 128, family: IPv6}]}]",
                4 if !deny && random.one_in(2) => {
                    "toPorts: [{ports: [{port: \"8081\", protocol: TCP}], rules: {http: [{method: GET}]}}]"
                }
                _ => "",
            };
            // A rule that denies must say what.
            match (deny, peers.is_empty() && ports.is_empty()) {
                (true, true) => format!("{{{side}Entities: [all]}}"),
                _ => format!("{{{peers}{ports}}}"),
            }
        };
        let mut fields = Vec::new();
        for (list, side, deny) in [
            ("ingress", "from", false),
            ("egress", "to", false),
            ("ingressDeny", "from", true),
            ("egressDeny", "to", true),
        ] {
            if self.one_in(3) {
                fields.push(format!("{list}: {}", self.list(2, |random| rule(random, side, deny))));
            }
        }
        if fields.is_empty() {
            fields.push("ingress: []".to_owned());
        }
        let (kind, namespace) = match self.below(2) {
            0 => ("CiliumClusterwideNetworkPolicy", String::new()),
            _ => ("CiliumNetworkPolicy", format!(", namespace: {}", self.pick(&["default", "prod"]))),
        };
        format!(
            "apiVersion: cilium.io/v2\nkind: {kind}\nmetadata: {{name: {name}{namespace}}}\n\
             spec: {{endpointSelector: {}, {}}}\n",
            self.labels(),
            fields.join(", ")
        )
    }

    fn admin(&mut self, name: &str) -> String {
        let set = |random: &mut Random| match random.below(2) {
            0 => format!("{{namespaces: {}}}", random.namespaces()),
            _ => format!(
                "{{pods: {{namespaceSelector: {}, podSelector: {}}}}}",
                random.namespaces(),
                random.labels()
            ),
        };
        let rules = |random: &mut Random, side: &str| {
            random.list(2, |random| {
                let action = random.pick(&["Allow", "Deny", "Pass"]);
                let ports = random.pick(&[
                    "",
                    "",
                    ", ports: [{portNumber: {protocol: TCP, port: 8080}}]",
                    ", ports: [{portRange: {protocol: TCP, start: 8400, end: 8600}}]",
                    ", ports: [{namedPort: web}]",
                    ", ports: [{portNumber: {protocol: UDP, port: 5353}}]",
                ]);
                format!("{{action: {action}, {side}: [{}]{ports}}}", set(random))
            })
        };
        let (priority, subject) = (self.below(9), set(self));
        let (ingress, egress) = (rules(self, "from"), rules(self, "to"));
        format!(
            "apiVersion: policy.networking.k8s.io/v1alpha1\nkind: AdminNetworkPolicy\nmetadata: {{name: {name}}}\n\
             spec: {{priority: {priority}, subject: {subject}, ingress: {ingress}, egress: {egress}}}\n"
        )
    }
}
