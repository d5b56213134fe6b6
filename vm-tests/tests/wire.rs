//! What is on the wire between two nodes while workloads speak the protocols that people use.

use std::fs;
use std::path::Path;
use std::time::Duration;

use vm_tests::agent::wait_until;
use vm_tests::skip::skip;
use vm_tests::{Capture, Mesh, Pod, Process, node, on_host, process, repeats};

const TEXT: &str = "the-price-list-of-next-year";
/// Of each protocol in each family; eight times that is 1,000.
const EACH: u64 = 125;

/// A server from the distribution, where there is one.
fn installed(name: &str) -> bool {
    ["/usr/sbin", "/usr/bin"].iter().any(|dir| Path::new(dir).join(name).exists())
}

/// nginx, which answers with what the header `X-Text` said.
fn nginx(pod: &Pod, dir: &Path) -> Process {
    let temp: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {}/{kind}; ", dir.display()))
        .concat();
    let config = format!(
        "daemon off; worker_processes 1; user root; pid {dir}/nginx.pid; error_log stderr;
events {{ worker_connections 1024; }}
http {{ access_log off; {temp}
  server {{ listen 80; listen [::]:80 ipv6only=on; location / {{ return 200 \"$http_x_text\"; }} }} }}",
        dir = dir.display()
    );
    let file = dir.join("nginx.conf");
    fs::write(&file, config).expect("write nginx.conf");
    let args = ["-e", "stderr", "-c", &file.display().to_string()];
    Process::spawn(&pod.place, Path::new("/usr/sbin/nginx"), &args, None)
}

fn redis(pod: &Pod, dir: &Path) -> Process {
    let dir = dir.display().to_string();
    let args = ["--bind", "0.0.0.0", "::", "--protected-mode", "no", "--save", "", "--dir", &dir];
    Process::spawn(&pod.place, Path::new("/usr/bin/redis-server"), &args, None)
}

#[test]
fn a_thousand_connections_of_four_protocols_show_nothing() {
    let mut mesh = Mesh::two();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(1, "b"));
    mesh.start();
    let mut protocols = vec![("greeting", 8081), ("raw", 8080)];
    let _texts = Process::serve(&b.place, "echo=[::]:8080 greet=[::]:8081");
    let dir = mesh.nodes[1].dir();
    let _nginx = installed("nginx").then(|| {
        protocols.push(("http", 80));
        nginx(&b, dir)
    });
    let _redis = installed("redis-server").then(|| {
        protocols.push(("redis", 6379));
        redis(&b, dir)
    });
    if !on_host() {
        skip("wire", "the image has no nginx and no redis, so two of four protocols");
    }
    assert!(protocols.len() == 4 || !on_host(), "run `cargo xtask setup`");
    for (protocol, port) in &protocols {
        let words = format!("talk {protocol} {} --text ready", b.at4(*port));
        let up = wait_until(Duration::from_secs(20), || process::load(&b.place, &words)["good"] == 1);
        assert!(up, "the {protocol} server does not answer");
    }

    let capture = Capture::start(&mesh.nodes[0].place("capture"), node::LINK);
    let each = repeats(EACH);
    for (protocol, port) in &protocols {
        for addr in [b.at4(*port), b.at6(*port)] {
            let result =
                process::load(&a.place, &format!("talk {protocol} {addr} --text {TEXT} --count {each}"));
            assert_eq!(result["good"], each, "{protocol} to {addr}: {result}");
        }
    }
    let wire = capture.finish();
    let connections = protocols.len() * 2 * each as usize;
    assert!(wire.in_tunnel() > connections * TEXT.len(), "only {} bytes in the tunnel", wire.in_tunnel());
    assert_eq!(wire.count(TEXT.as_bytes()), 0, "the text is on the wire");
    for word in ["HTTP/1.1", "X-Text: ", "nginx/", "220 hello"] {
        assert_eq!(wire.count(word.as_bytes()), 0, "{word:?} is on the wire");
    }
    // Agent and CA talk from node to node over TLS of their own.
    let mut outside = wire.outside_tunnel();
    outside.remove(&(6, 15012));
    assert!(outside.is_empty(), "{outside:?}");
    let connections = wire.tunnel_is_tls().unwrap_or_else(|error| panic!("{error}"));
    println!("{} bytes in {connections} connections, all TLS", wire.in_tunnel());
    assert!(connections >= 2, "one for each family");
}
