//! `RequestAuthentication`: whose tokens a workload believes.
//!
//! A request without a token passes without claims, one with a token that no rule finds good is refused: policy speaks of
//! the rest (istio:api security/v1/request_authentication.proto).

use super::fields::{At, Fields, Findings};
use super::security::{Selector, Target, selector, targets};
use super::yaml;
use crate::error::Severity;
use std::collections::BTreeSet;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct RequestAuthentication {
    pub selector: Selector,
    /// Instead of a selector: the workloads of these services.
    pub targets: Vec<Target>,
    pub rules: Vec<JwtRule>,
}

/// Tokens of one issuer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JwtRule {
    pub issuer: String,
    /// Empty: any.
    pub audiences: BTreeSet<String>,
    pub keys: Keys,
    /// Where a request carries its token. Empty: `Authorization: Bearer`, then the parameter `access_token`.
    pub places: Vec<Place>,
    /// The token goes on to the workload.
    pub forward: bool,
    /// Header that carries the verified payload to the workload, base64url.
    pub payload_to: Option<String>,
    /// Headers that carry single claims: name of the header, way to the claim.
    pub claims_to: Vec<(String, String)>,
}

/// The issuer's public keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Keys {
    Inline(Vec<Key>),
    /// Path of a file with a key set, which the agent reads.
    File(String),
}

/// A public key of a key set (RFC 7517), its numbers in base64url as they were written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    pub id: Option<String>,
    pub algorithm: Option<String>,
    pub key: PublicKey,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PublicKey {
    Rsa { modulus: String, exponent: String },
    Ec { curve: String, x: String, y: String },
    Okp { curve: String, x: String },
}

/// Where a token may be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In small letters; behind the prefix, if one is given.
    Header {
        name: String,
        prefix: String,
    },
    Parameter(String),
    Cookie(String),
}

/// Longest key set in bytes.
const MAX_KEYS: usize = 64 << 10;
/// Algorithms of signatures that a public key checks (RFC 7518 section 3.1, RFC 8037 section 3.1).
const SIGNATURES: &[&str] =
    &["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"];
/// Header of a token without a place of its own.
const AUTHORIZATION: &str = "authorization";

pub(super) fn request_authentication(
    namespace: &str,
    spec: Option<At<'_>>,
    out: &mut Findings,
) -> RequestAuthentication {
    let mut policy = RequestAuthentication::default();
    let Some(spec) = spec else { return policy };
    let mut spec = spec.fields(out);
    policy.selector = selector(&mut spec, out);
    policy.targets = targets(namespace, &mut spec, &policy.selector, out);
    policy.rules = spec.items("jwtRules", out).iter().filter_map(|at| rule(at, out)).collect();
    spec.finish(out);
    policy
}

fn rule(at: &At<'_>, out: &mut Findings) -> Option<JwtRule> {
    let mut fields = at.fields(out);
    let issuer = text(&mut fields, "issuer", out);
    if issuer.is_none() {
        out.error(at, "`issuer` is missing");
    }
    let audiences = fields.items("audiences", out).iter().filter_map(|at| present(at, out)).collect();
    let keys = keys(at, &mut fields, out);
    let mut places = Vec::new();
    for header in fields.items("fromHeaders", out) {
        let mut own = header.fields(out);
        let name = text(&mut own, "name", out);
        let prefix = own.take("prefix").and_then(|at| at.text(out)).unwrap_or_default();
        own.finish(out);
        match name {
            Some(name) => places.push(Place::Header { name: name.to_ascii_lowercase(), prefix }),
            None => out.error(&header, "`name` is missing"),
        }
    }
    for (list, place) in
        [("fromParams", Place::Parameter as fn(String) -> Place), ("fromCookies", Place::Cookie)]
    {
        places.extend(fields.items(list, out).iter().filter_map(|at| present(at, out)).map(place));
    }
    let forward = fields.take("forwardOriginalToken").and_then(|at| at.boolean(out)).unwrap_or(false);
    let payload_to = text(&mut fields, "outputPayloadToHeader", out);
    let mut claims_to = Vec::new();
    for claim in fields.items("outputClaimToHeaders", out) {
        let mut own = claim.fields(out);
        let names = (text(&mut own, "header", out), text(&mut own, "claim", out));
        own.finish(out);
        match names {
            (Some(header), _) if header.eq_ignore_ascii_case(AUTHORIZATION) => {
                out.error(&claim, "a claim cannot take the place of the token; use another header");
            }
            (Some(header), Some(claim)) => claims_to.push((header, claim)),
            _ => out.error(&claim, "`header` and `claim` are both needed"),
        }
    }
    // How long the proxy waits for a key set: none is fetched.
    fields.ignore(&["timeout"]);
    fields.finish(out);
    Some(JwtRule { issuer: issuer?, audiences, keys: keys?, places, forward, payload_to, claims_to })
}

fn is_base64url(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_'
}

fn text(fields: &mut Fields<'_>, name: &'static str, out: &mut Findings) -> Option<String> {
    fields.take(name).and_then(|at| present(&at, out))
}

fn present(at: &At<'_>, out: &mut Findings) -> Option<String> {
    let text = at.text(out)?;
    if text.is_empty() {
        out.error(at, "an empty text means nothing; remove it");
        return None;
    }
    Some(text)
}

fn keys(rule: &At<'_>, fields: &mut Fields<'_>, out: &mut Findings) -> Option<Keys> {
    let uri = fields.take("jwksUri").or_else(|| fields.take("jwks_uri"));
    match (fields.take("jwks"), uri) {
        (Some(_), Some(uri)) => out.error(&uri, "there is `jwks` too; use one of them"),
        (Some(at), None) => return key_set(&at, out).map(Keys::Inline),
        (None, Some(at)) => {
            let uri = present(&at, out)?;
            match uri.strip_prefix("file://") {
                Some(path) if path.starts_with('/') => return Some(Keys::File(path.to_owned())),
                _ => out.error(
                    &at,
                    "key sets are not fetched: an answer from elsewhere would decide who gets in; give the keys in \
                     `jwks`, or the path of a file as file:///path",
                ),
            }
        }
        (None, None) => out.error(rule, "`jwks` is missing: weft does not ask the issuer for its keys"),
    }
    None
}

/// JSON is YAML, so that what is wrong with it gets a place.
fn key_set(at: &At<'_>, out: &mut Findings) -> Option<Vec<Key>> {
    let text = present(at, out)?;
    if text.len() > MAX_KEYS {
        out.error(at, format!("the key set is longer than {MAX_KEYS} bytes"));
        return None;
    }
    let set = match yaml::parse(&text, at.node.line) {
        Ok(set) => set,
        Err(error) => {
            out.error(at, format!("no key set in JSON: {}", error.message));
            return None;
        }
    };
    let mut fields = At::new(&set, at.path.clone()).fields(out);
    let items = fields.items("keys", out);
    let before = out.0.len();
    let keys: Vec<Key> = items.iter().filter_map(|at| key(at, out)).collect();
    if keys.is_empty() && out.0[before..].iter().all(|finding| finding.severity != Severity::Error) {
        out.error(at, "no usable key is in the set: no token could be verified");
        return None;
    }
    Some(keys)
}

/// Other members of a key are the issuer's business (RFC 7517 section 4). One that weft cannot use is left out, for sets grow
/// keys of new kinds (section 5), and said; tokens that it signed are refused.
fn key(at: &At<'_>, out: &mut Findings) -> Option<Key> {
    let mut fields = at.fields(out);
    let mut member = |name: &'static str| fields.take(name).and_then(|at| present(&at, out));
    let (kind, id, algorithm) = (member("kty"), member("kid"), member("alg"));
    let (curve, x, y) = (member("crv"), member("x"), member("y"));
    let (modulus, exponent) = (member("n"), member("e"));
    let purpose = member("use");
    let secret = ["d", "p", "q", "k"].iter().any(|name| member(name).is_some());
    if secret {
        out.error(at, "this is a private or shared key; a key set for checking tokens has public keys only");
        return None;
    }
    let known = |curve: &String, names: &[&str]| names.contains(&curve.as_str());
    let signs = purpose.is_none_or(|purpose| purpose == "sig")
        && algorithm.as_ref().is_none_or(|algorithm| SIGNATURES.contains(&algorithm.as_str()));
    let numbers = [&x, &y, &modulus, &exponent];
    let written = numbers.into_iter().flatten().all(|number| number.bytes().all(is_base64url));
    let key = match (kind.as_deref().filter(|_| signs && written), curve, x, y, modulus, exponent) {
        (Some("RSA"), _, _, _, Some(modulus), Some(exponent)) => PublicKey::Rsa { modulus, exponent },
        (Some("EC"), Some(curve), Some(x), Some(y), ..) if known(&curve, &["P-256", "P-384", "P-521"]) => {
            PublicKey::Ec { curve, x, y }
        }
        (Some("OKP"), Some(curve), Some(x), ..) if known(&curve, &["Ed25519"]) => PublicKey::Okp { curve, x },
        _ => {
            let message = "left out, for it is no key that weft can use: RSA with n and e, EC (P-256, P-384, P-521) with x \
                           and y, or OKP (Ed25519) with x, in base64url, to check signatures with";
            out.add(Severity::Warning, at.node.line, &at.path, message);
            return None;
        }
    };
    Some(Key { id, algorithm, key })
}
