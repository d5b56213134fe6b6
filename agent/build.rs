//! Compiles the protocol definitions.

fn main() {
    let files = ["proto/citadel.proto"];
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(files, ["proto"]).expect("proto files compile");
    tonic_prost_build::configure().compile_fds(descriptors).expect("proto code is generated");
}
