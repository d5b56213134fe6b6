//! Who is let into a tunnel, asked with a TLS implementation that is not ours: openssl(1) as the client.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use vm_tests::leftovers::Dir;
use vm_tests::mesh::{dial, worked};
use vm_tests::process::binary;
use vm_tests::{Mesh, Pod, Process};

const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/a";
const SERVER: &str = "spiffe://cluster.local/ns/default/sa/b";

/// openssl(1) on files of one directory.
struct Openssl {
    dir: Dir,
}

impl Openssl {
    fn run(&self, words: &str) {
        let output = Command::new("openssl")
            .args(words.split_whitespace())
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .output()
            .expect("openssl is installed");
        assert!(output.status.success(), "openssl {words}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// `NAME.pem` and `NAME.key` for these names, signed by the intermediate of `ca`, valid for `days`.
    fn certificate(&self, name: &str, uris: &str, ca: &Path, days: u32) {
        let extensions = format!("{uris}keyUsage=digitalSignature\nextendedKeyUsage=clientAuth,serverAuth\n");
        fs::write(self.dir.path().join("extensions"), extensions).expect("write extensions");
        self.run(&format!("ecparam -name prime256v1 -genkey -noout -out {name}.key"));
        self.run(&format!("req -new -key {name}.key -subj / -out {name}.csr"));
        let (issuer, key) = (ca.join("intermediate.pem"), ca.join("intermediate.key"));
        self.run(&format!(
            "x509 -req -in {name}.csr -CA {} -CAkey {} -days {days} -extfile extensions -out {name}.leaf",
            issuer.display(),
            key.display()
        ));
        let leaf = fs::read_to_string(self.dir.path().join(format!("{name}.leaf"))).expect("just made");
        let issuer = fs::read_to_string(issuer).expect("the CA's intermediate");
        fs::write(self.dir.path().join(format!("{name}.pem")), leaf + &issuer).expect("write the chain");
    }

    /// Shakes hands with `addr` from `pod`, as `shown` or as nobody; what openssl says about it.
    fn client(&self, pod: &Pod, addr: &str, root: &Path, shown: Option<&str>) -> String {
        let mut args = vec![
            "exec".to_owned(),
            pod.place.netns.display().to_string(),
            pod.place.cgroup.display().to_string(),
        ];
        args.extend(
            "timeout 5 openssl s_client -tls1_3 -alpn h2 -noservername -verify_return_error"
                .split(' ')
                .map(Into::into),
        );
        args.extend(["-showcerts", "-connect", addr, "-CAfile", &root.display().to_string()].map(Into::into));
        if let Some(name) = shown {
            let file = |suffix: &str| self.dir.path().join(format!("{name}.{suffix}")).display().to_string();
            args.extend(
                ["-cert", &file("pem"), "-cert_chain", &file("pem"), "-key", &file("key")].map(Into::into),
            );
        }
        // An open stdin keeps the session open: what the server says after the handshake counts.
        let mut child = Command::new(binary("wt-load"))
            .args(&args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start wt-load");
        let held = child.stdin.take();
        let output = child.wait_with_output().expect("openssl ends");
        drop(held);
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    }
}

/// The lines of openssl's text form of the first certificate in `text`.
fn read_certificate(text: &str) -> String {
    let from = text.find("-----BEGIN CERTIFICATE-----").expect("the server showed a certificate");
    let to = text[from..].find("-----END CERTIFICATE-----").expect("a whole one") + from + 25;
    let dir = Dir::create("shown");
    let file = dir.path().join("shown.pem");
    fs::write(&file, &text[from..to]).expect("write a certificate");
    let output = Command::new("openssl").args(["x509", "-noout", "-text", "-in"]).arg(&file).output();
    String::from_utf8_lossy(&output.expect("openssl is installed").stdout).into_owned()
}

fn foreign_ca() -> (Dir, PathBuf) {
    let dir = Dir::create("foreign");
    let path = dir.path().join("ca");
    let made = Command::new(binary("weft")).args(["ca", "init", "--dir"]).arg(&path).output();
    assert!(made.expect("start weft").status.success());
    (dir, path)
}

#[test]
fn both_ends_have_a_name_and_strangers_are_refused() {
    let mut mesh = Mesh::two();
    let (a, b) = (mesh.pod(0, "a"), mesh.pod(1, "b"));
    // Unknown to every agent, so that no agent speaks for it.
    let outsider = mesh.stranger(0, "outsider");
    mesh.start();
    let _server = Process::serve(&b.place, "whoami=[::]:8080");
    let ca = mesh.ca().dir().to_owned();
    let root = mesh.ca().root();
    let openssl = Openssl { dir: Dir::create("openssl") };
    let uri = |id: &str| format!("subjectAltName=URI:{id}\n");
    openssl.certificate("good", &uri(CLIENT), &ca, 1);
    openssl.certificate("expired", &uri(CLIENT), &ca, 0);
    openssl.certificate("elsewhere", &uri("spiffe://elsewhere/ns/default/sa/a"), &ca, 1);
    openssl.certificate("nameless", "", &ca, 1);
    openssl.certificate("node", &uri("spiffe://cluster.local/node/node1"), &ca, 1);
    let (_dir, foreign) = foreign_ca();
    openssl.certificate("foreign", &uri(CLIENT), &foreign, 1);
    sleep(Duration::from_secs(2)); // Zero days are over.

    for addr in [b.at4(15008), b.at6(15008)] {
        let good = openssl.client(&outsider, &addr, &root, Some("good"));
        assert!(good.contains("Verify return code: 0 (ok)") && good.contains("ALPN protocol: h2"), "{good}");
        assert!(!good.contains("alert"), "{good}");
        let shown = read_certificate(&good);
        assert!(shown.contains(&format!("URI:{SERVER}")), "{shown}");
        for (name, alert) in [
            (None, "certificate required"),
            (Some("expired"), "certificate expired"),
            (Some("foreign"), "unknown ca"),
            (Some("elsewhere"), "alert"),
            (Some("nameless"), "alert"),
            (Some("node"), "alert"),
        ] {
            let refused = openssl.client(&outsider, &addr, &root, name);
            assert!(refused.contains(alert), "{name:?} to {addr}: {refused}");
        }
    }
    // The agents' own names for both ends of a connection.
    assert!(worked(&dial(&a, &b.at4(8080))));
    let labels = [
        format!("source_principal=\"{CLIENT}\""),
        format!("destination_principal=\"{SERVER}\""),
        "connection_security_policy=\"mutual_tls\"".to_owned(),
    ];
    let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
    // Once at each end.
    assert_eq!(mesh.metric("istio_tcp_connections_opened_total", &labels), 2.0);
    let log = mesh.agents[1].log();
    for sentence in [
        "showed no certificate",
        "certificate expired at",
        "not issued under a root",
        "outside the trust domain",
        "has 0 URI names",
        "is for no workload",
    ] {
        assert!(log.contains(sentence), "the agent does not say {sentence:?}:\n{log}");
    }
}
