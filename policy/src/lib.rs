//! Manifests in, tables out.
#![forbid(unsafe_code)]
