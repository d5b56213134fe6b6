//! Who a workload is.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// `spiffe://<trust domain>/ns/<namespace>/sa/<service account>`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpiffeId {
    pub trust_domain: Arc<str>,
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
}

impl SpiffeId {
    pub fn new(trust_domain: &str, namespace: &str, service_account: &str) -> Self {
        SpiffeId {
            trust_domain: trust_domain.into(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        }
    }

    /// As policies write a principal: without the scheme.
    pub fn principal(&self) -> String {
        format!("{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl FromStr for SpiffeId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.strip_prefix("spiffe://").unwrap_or("").split('/').collect();
        match parts[..] {
            [td, "ns", ns, "sa", sa] if [td, ns, sa].iter().all(|part| !part.is_empty()) => {
                Ok(SpiffeId::new(td, ns, sa))
            }
            _ => Err(format!(
                "{text:?} is no workload: expected spiffe://<trust domain>/ns/<namespace>/sa/<account>"
            )),
        }
    }
}

/// What the node gives a number to: a SPIFFE ID, and the labels that selectors look at. Pods of one service account
/// with equal labels are one identity.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity {
    pub spiffe: SpiffeId,
    pub labels: Arc<BTreeMap<String, String>>,
}

impl fmt::Display for Identity {
    /// One text per identity, for reverse maps and digests: the SPIFFE ID, then `key=value` in order of keys. Neither
    /// a SPIFFE ID nor a Kubernetes label can contain the comma or the semicolon.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.spiffe)?;
        for (index, (key, value)) in self.labels.iter().enumerate() {
            write!(f, "{}{key}={value}", if index == 0 { ';' } else { ',' })?;
        }
        Ok(())
    }
}
