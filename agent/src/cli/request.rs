//! The request that `weft policy explain` is asked about, from its flags.

use weft_policy::Request;
use weft_policy::request::{Claim, Claims};

use super::Failure;
use crate::args::{ExplainArgs, IpProtocol};

/// The request, if any flag speaks of one: `GET /` where the flags say nothing else.
pub(super) fn request(args: &ExplainArgs) -> Result<Option<Request>, Failure> {
    let texts = [&args.method, &args.path, &args.host];
    if texts.iter().all(|text| text.is_none()) && args.header.is_empty() && args.claim.is_empty() {
        return Ok(None);
    }
    if args.protocol != IpProtocol::Tcp {
        return Err(usage("HTTP is asked about over --protocol tcp only".to_owned()));
    }
    let headers = args.header.iter().map(|header| match header.split_once(':') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.trim().to_owned())),
        _ => Err(usage(format!("--header {header:?}: write it as name:value"))),
    });
    let mut claims = None;
    for text in &args.claim {
        let wrong = || usage(format!("--claim {text:?}: write it as name=value, or outer[inner]=value"));
        let (name, value) = text.split_once('=').ok_or_else(wrong)?;
        let names: Vec<&str> = name.split('[').map(|name| name.trim_end_matches(']')).collect();
        if names.contains(&"") || !put(claims.get_or_insert_with(Claims::new), &names, value) {
            return Err(wrong());
        }
    }
    let text = |given: &Option<String>, default: &str| given.clone().unwrap_or_else(|| default.to_owned());
    Ok(Some(Request {
        method: text(&args.method, "GET"),
        host: text(&args.host, ""),
        path: text(&args.path, "/"),
        headers: headers.collect::<Result<_, _>>()?,
        claims,
    }))
}

/// Adds a text to the claim of that name; `false` where something else stands there. A second text makes a list.
fn put(claims: &mut Claims, names: &[&str], value: &str) -> bool {
    let Some((name, inner)) = names.split_first() else { return false };
    if !inner.is_empty() {
        let nested = claims.entry((*name).to_owned()).or_insert_with(|| Claim::Nested(Claims::new()));
        return match nested {
            Claim::Nested(nested) => put(nested, inner, value),
            _ => false,
        };
    }
    let text = value.to_owned();
    match claims.get_mut(*name) {
        None => drop(claims.insert((*name).to_owned(), Claim::Text(text))),
        Some(Claim::Nested(_)) => return false,
        Some(Claim::Texts(texts)) => texts.push(text),
        Some(Claim::Text(first)) => {
            let texts = vec![std::mem::take(first), text];
            claims.insert((*name).to_owned(), Claim::Texts(texts));
        }
    }
    true
}

fn usage(message: String) -> Failure {
    Failure::usage(anyhow::anyhow!(message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_are_texts_lists_and_nested() {
        let mut claims = Claims::new();
        for (names, value) in [(&["a"][..], "1"), (&["b", "c"], "2"), (&["a"], "3"), (&["a"], "4")] {
            assert!(put(&mut claims, names, value));
        }
        assert!(!put(&mut claims, &["b"], "5") && !put(&mut claims, &["a", "x"], "5"));
        let texts = ["1", "3", "4"].map(str::to_owned).to_vec();
        assert_eq!(claims["a"], Claim::Texts(texts));
        assert_eq!(claims["b"], Claim::Nested(Claims::from([("c".into(), Claim::Text("2".into()))])));
    }
}
