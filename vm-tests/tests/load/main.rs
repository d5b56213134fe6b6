//! Every program passes this kernel's verifier, and what a kernel refuses is told with program, hook and reason.

mod cost;

use aya::programs::{Program, ProgramError};
use aya::{Ebpf, EbpfLoader};
use vm_tests::machine;
use vm_tests::verifier;
use weft_datapath::names::config;

/// The programs of weft.
const WEFT: &str = "weft-ebpf";
/// Programs that are meant to be refused.
const BROKEN: &str = "weft-broken";
/// Lines of the verifier's log that say why; the rest is the way there.
const LAST: usize = 12;

fn read(object: &str) -> Vec<u8> {
    let path = format!("{}/../target/bpf/{object}", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}; run `cargo xtask build-ebpf`"))
}

/// Loads the programs of an object for a kernel with these features, all or one.
fn load(object: &str, only: Option<&str>, features: u32) -> Result<Ebpf, String> {
    let mut ebpf = EbpfLoader::new()
        .override_global(config::GLOBAL, &features, false)
        .load(&read(object))
        .map_err(|e| format!("the object does not load: {e}"))?;
    let mut names: Vec<String> = ebpf.programs().map(|(name, _)| name.to_owned()).collect();
    names.sort();
    names.retain(|name| only.is_none_or(|only| only == name));
    assert!(!names.is_empty(), "{object} has no such program");
    for name in &names {
        let program = ebpf.program_mut(name).expect("listed");
        let hook = format!("{:?}", program.prog_type());
        let loaded = match program {
            Program::SockOps(program) => program.load(),
            Program::SchedClassifier(program) => program.load(),
            Program::CgroupSockAddr(program) => program.load(),
            _ => Err(ProgramError::UnexpectedProgramType),
        };
        loaded.map_err(|error| refusal(name, &hook, &error))?;
    }
    Ok(ebpf)
}

/// Program, hook and the verifier's last lines.
fn refusal(name: &str, hook: &str, error: &ProgramError) -> String {
    let ProgramError::LoadError { io_error, verifier_log } = error else {
        return format!("kernel {} refuses {name} ({hook}): {error}", machine::kernel());
    };
    let log = verifier_log.to_string();
    let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = lines[lines.len().saturating_sub(LAST)..].join("\n    ");
    format!("kernel {} refuses {name} ({hook}): {io_error}\n    {last}", machine::kernel())
}

#[test]
fn every_program_passes_the_verifier() {
    let all = config::SET_RETVAL | config::SOCKOPS_NETNS;
    // Older kernels lack some helpers; which ones is found by trying, as the agent does.
    let candidates = [all, config::SOCKOPS_NETNS, 0];
    let mut refused = Vec::new();
    let loaded = candidates
        .into_iter()
        .find_map(|features| load(WEFT, None, features).map_err(|e| refused.push(e)).ok());
    let loaded = loaded.unwrap_or_else(|| panic!("{}", refused.join("\n")));
    let costs = cost::of_programs(&read(WEFT), &loaded);
    assert_eq!(costs.len(), 13, "{costs:?}");
    for (name, program) in loaded.programs() {
        // Kernels before 5.16 do not tell.
        if let Some(count) = program.info().expect("loaded").verified_instruction_count() {
            assert_eq!(count, costs[name].instructions, "{name}: what was measured is not what runs");
        }
    }
    // What follows the first word can go into verifier.txt as it is.
    println!(); // The harness has begun a line.
    costs.iter().for_each(|(name, cost)| println!("verified {} {name} {cost}", machine::kernel()));
    let grown = verifier::growth(&machine::kernel(), &costs);
    assert!(grown.is_empty(), "{}", grown.join("\n"));
}

#[test]
fn a_missing_bounds_check_is_refused_and_named() {
    let refused = load(BROKEN, Some("broken_bounds"), 0).expect_err("it reads behind the end of a frame");
    let kernel = format!("kernel {}", machine::kernel());
    for word in [&kernel, "broken_bounds", "SchedClassifier", "invalid access to packet"] {
        assert!(refused.contains(word), "no {word} in: {refused}");
    }
}

#[test]
fn a_helper_that_a_kernel_lacks_is_named() {
    let result = load(BROKEN, Some("broken_helper"), 0);
    if machine::kernel() == "5.10" {
        let refused = result.expect_err("5.10 has no netns cookies in sock_ops programs");
        for word in ["kernel 5.10", "broken_helper", "SockOps", "bpf_get_netns_cookie"] {
            assert!(refused.contains(word), "no {word} in: {refused}");
        }
    } else {
        assert!(result.is_ok(), "{result:?}");
    }
}
