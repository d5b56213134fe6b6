//! Every program passes this kernel's verifier, and what a kernel refuses is told with program, hook and reason.

use std::collections::BTreeMap;

use aya::EbpfLoader;
use aya::programs::{CgroupSockAddr, ProgramError, SchedClassifier, SockOps};
use vm_tests::{skip, verifier};
use weft_datapath::names::config;

/// Lines of the verifier's log that say why; the rest is the way there.
const LAST: usize = 12;

/// Loads all programs for a kernel with these features; how many instructions each took to verify, where it is told.
fn load(features: u32) -> Result<BTreeMap<String, u32>, String> {
    let object = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bpf/weft-ebpf");
    let bytes =
        std::fs::read(object).unwrap_or_else(|e| panic!("{object}: {e}; run `cargo xtask build-ebpf`"));
    let mut ebpf = EbpfLoader::new()
        .override_global(config::GLOBAL, &features, true)
        .load(&bytes)
        .map_err(|e| format!("the object does not load: {e}"))?;
    let mut names: Vec<String> = ebpf.programs().map(|(name, _)| name.to_owned()).collect();
    names.sort();
    assert_eq!(names.len(), 13, "{names:?}");
    let mut counts = BTreeMap::new();
    for name in &names {
        let program = ebpf.program_mut(name).expect("listed");
        let hook = format!("{:?}", program.prog_type());
        let loaded = match name.as_str() {
            "weft_sockops" => <&mut SockOps>::try_from(program).expect("kind").load(),
            "weft_from_wl" | "weft_to_wl" => <&mut SchedClassifier>::try_from(program).expect("kind").load(),
            _ => <&mut CgroupSockAddr>::try_from(program).expect("kind").load(),
        };
        loaded.map_err(|error| refusal(name, &hook, &error))?;
        let info = ebpf.program(name).expect("listed").info().expect("loaded");
        // Kernels before 5.16 do not tell.
        counts.extend(info.verified_instruction_count().map(|count| (name.clone(), count)));
    }
    Ok(counts)
}

/// Program, hook and the verifier's last lines.
fn refusal(name: &str, hook: &str, error: &ProgramError) -> String {
    let ProgramError::LoadError { io_error, verifier_log } = error else {
        return format!("kernel {} refuses {name} ({hook}): {error}", skip::kernel());
    };
    let log = verifier_log.to_string();
    let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = lines[lines.len().saturating_sub(LAST)..].join("\n    ");
    format!("kernel {} refuses {name} ({hook}): {io_error}\n    {last}", skip::kernel())
}

#[test]
fn every_program_passes_the_verifier() {
    let all = config::SET_RETVAL | config::SOCKOPS_NETNS;
    // Older kernels lack some helpers; which ones is found by trying, as the agent does.
    let candidates = [all, config::SOCKOPS_NETNS, 0];
    let mut refused = Vec::new();
    let counts = candidates.into_iter().find_map(|features| load(features).map_err(|e| refused.push(e)).ok());
    let counts = counts.unwrap_or_else(|| panic!("{}", refused.join("\n")));
    // These lines can go into verifier.txt as they are.
    counts.iter().for_each(|(name, count)| println!("{} {name} {count}", skip::kernel()));
    let grown = verifier::growth(&skip::kernel(), &counts);
    assert!(grown.is_empty(), "{}", grown.join("\n"));
}

#[test]
fn a_helper_that_a_kernel_lacks_is_named() {
    let result = load(config::SOCKOPS_NETNS);
    if skip::kernel() == "5.10" {
        let refused = result.expect_err("5.10 has no netns cookies in sock_ops programs");
        for word in ["kernel 5.10", "weft_sockops", "SockOps", "bpf_get_netns_cookie"] {
            assert!(refused.contains(word), "no {word} in: {refused}");
        }
    } else {
        assert!(result.is_ok(), "{result:?}");
    }
}
