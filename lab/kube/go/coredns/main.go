// CoreDNS with the plugins that manifests/coredns.yaml names. All plugins of CoreDNS would bring
// the libraries of several clouds: 1405 Go packages instead of 772.
package main

import (
	"github.com/coredns/coredns/coremain"
	_ "github.com/coredns/coredns/plugin/errors"
	_ "github.com/coredns/coredns/plugin/kubernetes"
	_ "github.com/coredns/coredns/plugin/loadbalance"
	_ "github.com/coredns/coredns/plugin/ready"
)

func main() {
	coremain.Run()
}
