//! Identity numbers: the kernel's names for "SPIFFE ID plus labels".
//!
//! INVARIANT: a number is never given to two identities while the pin directory lives, since conntrack entries and
//! counters of an identity may outlast it. So the counter only grows, and moves on before a number is handed out.

use std::collections::BTreeMap;

use aws_lc_rs::digest::{SHA256, digest};
use weft_datapath::identity::{ANY, FIRST_WORKLOAD};
use weft_datapath::names::config;

use super::error::{Error, Result};
use super::maps::Maps;
use super::mirror::Mirror;

/// The numbers handed out so far.
#[derive(Debug)]
pub struct Numbers {
    known: Mirror<[u8; 32], u32>,
}

impl Numbers {
    /// Reads what a former agent handed out.
    pub fn read(maps: &Maps) -> Result<Numbers> {
        Ok(Numbers { known: Mirror::read(&maps.identity)? })
    }

    /// The number of the identity with this canonical text; a new one if it never had one.
    pub fn number(&mut self, maps: &Maps, identity: &str) -> Result<u32> {
        let hash = sha256(identity);
        if let Some(number) = self.known.have().get(&hash) {
            return Ok(*number);
        }
        let number = maps.config.lookup(&config::NEXT_IDENTITY)?.unwrap_or(0).max(FIRST_WORKLOAD);
        if number == ANY {
            return Err(Error::NumbersUsedUp);
        }
        maps.config.insert(&config::NEXT_IDENTITY, &(number + 1))?;
        self.known.write(&maps.identity, hash, number)?;
        Ok(number)
    }

    /// Numbers for all of `identities`, by their text.
    pub fn all<'a>(
        &mut self,
        maps: &Maps,
        identities: impl IntoIterator<Item = &'a str>,
    ) -> Result<BTreeMap<&'a str, u32>> {
        identities.into_iter().map(|text| Ok((text, self.number(maps, text)?))).collect()
    }
}

fn sha256(text: &str) -> [u8; 32] {
    digest(&SHA256, text.as_bytes()).as_ref().try_into().expect("SHA-256 has 32 bytes")
}
