//! Kubernetes label selectors.

use std::collections::{BTreeMap, BTreeSet};

/// Implicit label of every namespace: its name (Kubernetes well-known labels).
pub const NAMESPACE_NAME: &str = "kubernetes.io/metadata.name";
/// Implicit label of every pod: its service account (Cilium, pkg/k8s/apis/cilium.io, `PolicyLabelServiceAccount`).
pub const SERVICE_ACCOUNT: &str = "io.cilium.k8s.policy.serviceaccount";

/// `matchLabels` and `matchExpressions`: all must hold, so that the empty selector selects everything.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LabelSelector {
    pub equal: BTreeMap<String, String>,
    pub expressions: Vec<Requirement>,
}

/// One of `matchExpressions`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Requirement {
    pub key: String,
    pub operator: Operator,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operator {
    In(BTreeSet<String>),
    /// Also holds where the key is absent.
    NotIn(BTreeSet<String>),
    Exists,
    DoesNotExist,
}

/// Do these labels hold all that are wanted?
pub(crate) fn carries(labels: &BTreeMap<String, String>, wanted: &BTreeMap<String, String>) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}

impl LabelSelector {
    /// Selects what carries this one label.
    pub fn equal(key: &str, value: &str) -> LabelSelector {
        LabelSelector { equal: BTreeMap::from([(key.into(), value.into())]), expressions: Vec::new() }
    }

    /// Selects everything.
    pub fn is_empty(&self) -> bool {
        self.equal.is_empty() && self.expressions.is_empty()
    }

    /// Does it hold for labels that are looked up by key?
    pub fn matches<'l>(&self, label: impl Fn(&str) -> Option<&'l str>) -> bool {
        self.equal.iter().all(|(key, value)| label(key) == Some(value))
            && self.expressions.iter().all(|Requirement { key, operator }| match operator {
                Operator::In(values) => label(key).is_some_and(|value| values.contains(value)),
                Operator::NotIn(values) => label(key).is_none_or(|value| !values.contains(value)),
                Operator::Exists => label(key).is_some(),
                Operator::DoesNotExist => label(key).is_none(),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holds(operator: Operator, value: Option<&'static str>) -> bool {
        let expressions = vec![Requirement { key: "k".into(), operator }];
        LabelSelector { expressions, ..LabelSelector::default() }.matches(|key| value.filter(|_| key == "k"))
    }

    #[test]
    fn operators_are_those_of_kubernetes() {
        let ab = || BTreeSet::from(["a".to_owned(), "b".to_owned()]);
        assert!(holds(Operator::In(ab()), Some("a")) && !holds(Operator::In(ab()), Some("c")));
        assert!(!holds(Operator::In(ab()), None));
        assert!(!holds(Operator::NotIn(ab()), Some("a")) && holds(Operator::NotIn(ab()), Some("c")));
        assert!(holds(Operator::NotIn(ab()), None), "an absent key is in no set");
        assert!(holds(Operator::Exists, Some("")) && !holds(Operator::Exists, None));
        assert!(!holds(Operator::DoesNotExist, Some("")) && holds(Operator::DoesNotExist, None));
        assert!(LabelSelector::default().matches(|_| None));
        assert!(!LabelSelector::equal("k", "v").matches(|_| None));
    }
}
