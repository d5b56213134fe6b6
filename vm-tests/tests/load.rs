//! Every program passes this kernel's verifier.

use aya::EbpfLoader;
use aya::programs::{CgroupSockAddr, SchedClassifier, SockOps};

#[test]
fn every_program_passes_the_verifier() {
    let object = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bpf/weft-ebpf");
    let bytes =
        std::fs::read(object).unwrap_or_else(|e| panic!("{object}: {e}; run `cargo xtask build-ebpf`"));
    let features = weft_datapath::names::config::SET_RETVAL | weft_datapath::names::config::SOCKOPS_NETNS;
    let mut ebpf = EbpfLoader::new()
        .override_global(weft_datapath::names::config::GLOBAL, &features, true)
        .load(&bytes)
        .expect("the object loads");
    let mut names: Vec<String> = ebpf.programs().map(|(name, _)| name.to_owned()).collect();
    names.sort();
    assert_eq!(names.len(), 13, "{names:?}");
    for name in &names {
        let program = ebpf.program_mut(name).expect("listed");
        let loaded = match name.as_str() {
            "weft_sockops" => <&mut SockOps>::try_from(program).expect("kind").load(),
            "weft_from_wl" | "weft_to_wl" => <&mut SchedClassifier>::try_from(program).expect("kind").load(),
            _ => <&mut CgroupSockAddr>::try_from(program).expect("kind").load(),
        };
        if let Err(error) = loaded {
            panic!("{name}: {error:?}");
        }
        let info = ebpf.program(name).expect("listed").info().expect("loaded");
        println!("{name}: {} instructions verified", info.verified_instruction_count().unwrap_or(0));
    }
}
